"""A look at a few images of each pool of unpaired training, for mistakes that end in a useless network.

The same images are looked at every time, and no random number is drawn: training itself does not change.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F

from data import images
from data.paths import spread
from utils import physics
from utils.errors import UserError

SAMPLE = 16  # images of a pool that are looked at, evenly spread over it
FEW = 3  # images of a pool that is too small; the embedded sample set has 4
SIDE = 128  # pixels: the long side at which an image is measured
GREY = 1 / 255  # a mean distance between the channels below which an image has no colour


class _Look(NamedTuple):
    """What was measured of an image: the bytes at `SIDE`, whether it is grey, the mean of the dark channel."""

    content: bytes
    grey: bool
    dark: float


def warnings(hazy: Sequence[Path] | None, clear: Sequence[Path]) -> list[str]:
    """A line for each thing that is wrong with the pools, and what to do; ``hazy`` is None if haze is synthetic."""
    pools = {"data.clear": clear} if hazy is None else {"data.hazy": hazy, "data.clear": clear}
    looks = {name: list(_looks(paths)) for name, paths in pools.items()}
    found = [line for name, paths in pools.items() for line in _of_one(name, len(paths), looks[name])]
    if all(looks.values()) and hazy is not None:
        hazy_dark, clear_dark = (statistics.median(look.dark for look in looks[name]) for name in pools)
        if hazy_dark <= clear_dark:
            found.append(
                f"data.hazy does not look hazier than data.clear (median of the dark channel {hazy_dark:.2f} and "
                f"{clear_dark:.2f} of {SAMPLE} images each at most); if the two are exchanged, or the same, mend that"
            )
    return found


def _looks(pool: Sequence[Path]) -> Iterator[_Look]:
    """Looks at the sample of a pool, without images that cannot be read: training reports those."""
    for path in spread(pool, SAMPLE):
        try:
            image = images.read(path)[None]
        except UserError:
            continue
        scale = min(1.0, SIDE / max(image.shape[2:]))
        small = F.interpolate(image, [max(1, round(side * scale)) for side in image.shape[2:]], mode="area")
        grey = (small.amax(1) - small.amin(1)).mean().item() < GREY
        yield _Look(small.numpy().tobytes(), grey, physics.dark_channel(small).mean().item())


def _of_one(name: str, size: int, looks: list[_Look]) -> Iterator[str]:
    """Warnings about the pool of that ``name`` and ``size`` by itself."""
    seen = f"{len(looks)} of its {size} images were looked at, and"
    if size <= FEW:
        yield f"{name} is very small ({size}): the network will learn the images by heart; name a larger folder"
    if len(looks) > 1 and len({look.content for look in looks}) == 1:
        yield f"{name}: {seen} all are the same; check how the folder or list was made"
    if (grey := sum(look.grey for look in looks)) * 2 > len(looks):
        yield f"{name}: {seen} {grey} are grey: networks learn no colour from them; use images in colour"
