"""The output images of test.py: their names, formats and contents."""

from collections.abc import Sequence
from pathlib import PurePosixPath

import torch
from torch import Tensor

from utils.config import Test
from utils.errors import UserError, quoted
from utils.evaluation import report
from utils.files import IMAGE_FORMATS

LOSSLESS = ".png"


def names(inputs: Sequence[str], test: Test, scored: bool) -> dict[str, str]:
    """The output file of each input; if figures are measured (``scored``) the default format is lossless."""
    suffix = test.suffix or ""
    if bad := set(suffix) & set('/\\:*?"<>|'):
        raise UserError(
            f"test.suffix={quoted(suffix)}: no {min(bad)} can be in a file's name; take letters, digits, _ or -"
        )

    def ending(name: str) -> str:
        extension = f".{test.format}"
        if test.format == "auto":
            current = PurePosixPath(name).suffix
            extension = current if current.lower() in IMAGE_FORMATS and not scored else LOSSLESS
        return suffix + extension

    return report.image_names(inputs, ending)


def shown(hazy: Tensor, result: Tensor, test: Test) -> Tensor:
    """The content of the file, from the hazy image (3,H,W) and the method's result (3 or 1,H,W)."""
    if test.show != "side_by_side":
        return result
    return torch.cat([hazy.to(result), result], 2)


def check_measurable(test: Test, scored: bool) -> None:
    """Refuse to measure transmission maps, which are not dehazed images. Raises `UserError`."""
    if scored and test.show == "transmission":
        raise UserError("test.show=transmission: there is no dehazed image to measure; leave the ground truth out")
