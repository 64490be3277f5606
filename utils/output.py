"""What test.py makes of a dehazed image before it becomes a file: its name, its kind, and what is shown in it."""

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
    """The file that each input becomes. Where figures are taken (``scored``) images lose nothing unless asked to."""
    suffix = test.suffix or ""
    if bad := set(suffix) & set('/\\:*?"<>|'):
        raise UserError(
            f"test.suffix={quoted(suffix)}: no {min(bad)} can be in a file's name; take letters, digits, _ or -"
        )

    def kind(name: str) -> str:
        own = PurePosixPath(name).suffix
        ending = f".{test.format}"
        if test.format == "auto":
            ending = own if own.lower() in IMAGE_FORMATS and not scored else LOSSLESS
        return suffix + ending

    return report.picture_names(inputs, kind)


def shown(hazy: Tensor, made: Tensor, test: Test) -> Tensor:
    """What is put into the file, from the hazy image (3,H,W) and what was made of it (3 or 1,H,W)."""
    if test.show != "side_by_side":
        return made
    return torch.cat([hazy.to(made), made], 2)


def refuse_hidden(test: Test, scored: bool) -> None:
    """Refuse to measure what is no dehazed image. Raises `UserError`."""
    if scored and test.show == "transmission":
        raise UserError("test.show=transmission: there is no dehazed image to measure; leave the ground truth out")
