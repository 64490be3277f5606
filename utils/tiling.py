"""Large images in bounded memory: maps computed piece by piece, and how large the pieces should be.

What is local (convolutions) is computed in tiles that are cut with a halo, as wide as the function sees, and pasted
without it: the numbers are those of the whole map, up to the rounding of floats. What is global (an airlight, a mean
over the image, coordinates) must be taken from the whole map by the caller. A function that cannot be taken apart
like this is computed on overlapping tiles, which are cross-faded (``blend``): near the whole, not equal to it.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils import memory
from utils.errors import UserError, quoted

SMALLEST = 128  # pixels: below it a tile is more halo than core
SIDES = (1024, 768, 512, 384, 256, SMALLEST)  # tiling is exact and 1024 costs a few percent: none larger is needed
WHOLE_PIXELS = 2_000_000  # images up to this size are taken whole where memory allows
# Bytes a pixel that NeDR of width 64 needs in float32 on the CPU, beside itself and the image: of an image taken
# whole (measured: 1160), of one taken in tiles, and of a tile (together 2.6 GB for 5436x3612).
WHOLE_BYTES, PICTURE_BYTES, TILE_BYTES = 1500, 120, 1500


class Window(NamedTuple):
    """Where a piece lies in the map that it was cut from."""

    rows: slice
    columns: slice
    size: tuple[int, int]  # (height, width) of the whole map

    def cut(self, x: Tensor) -> Tensor:
        """The same piece of another map of that size: (...,H,W) -> (...,h,w)."""
        return x[..., self.rows, self.columns]


class Cut(NamedTuple):
    """One tile along one axis: what it answers for, and what it must see for that."""

    start: int
    stop: int
    seen: slice


def apply(
    f: Callable[[Tensor, Window], Tensor],
    x: Tensor,
    *,
    tile: int | None,
    halo: int = 0,
    down: int = 1,
    up: int = 1,
    blend: int = 0,
) -> Tensor:
    """``f`` on every tile of ``x``, put together. (N,C,H,W) -> (N,C',H up/down,W up/down).

    ``f(piece, window)`` gives ``up/down`` as many pixels a side as the piece has, in a type and with channels that are
    the same for every piece. Tiles are at most ``tile`` pixels of ``x`` a side, begin at multiples of ``down`` (H and W
    must be multiples of it) and see ``halo`` more on every side, less at the borders of ``x``. With ``tile=None`` or a
    tile larger than ``x`` this is ``f`` of the whole, with gradients.

    ``blend``, at most ``halo``, cross-fades neighbours over as many pixels on either side of where they meet, by
    raised-cosine weights that sum to one; a tile may then not be narrower than two of it.
    """
    height, width = x.shape[-2:]
    if tile is None or tile >= max(height, width):
        return f(x, Window(slice(0, height), slice(0, width), (height, width)))
    if height % down or width % down or blend > halo:
        raise ValueError(f"tiles of {height}x{width}: down={down} must divide both, and {blend=} not exceed {halo=}")
    across, out = _cuts(width, tile, halo, down, blend), None
    for rows in _cuts(height, tile, halo, down, blend):
        if x.device.type == "cpu":
            memory.release_memory()  # else the heap frays, and each row leaves more of it behind
        for columns in across:
            y = f(x[..., rows.seen, columns.seen], Window(rows.seen, columns.seen, (height, width)))
            if out is None:
                size = (height * up // down, width * up // down)
                out = y.new_zeros(*y.shape[:2], *size) if blend else y.new_empty(*y.shape[:2], *size)
            to_rows, from_rows, fade_rows = _paste(rows, height, up, down, blend)
            to_columns, from_columns, fade_columns = _paste(columns, width, up, down, blend)
            y = y[..., from_rows, from_columns]
            if blend:
                out[..., to_rows, to_columns] += y * fade_rows.to(y)[:, None] * fade_columns.to(y)
            else:
                out[..., to_rows, to_columns] = y
    return out


def through(module: nn.Module, x: Tensor, *, tile: int | None, down: int = 1) -> Tensor:
    """``module``, of convolutions one after the other that divide the size by ``down``, on every tile of ``x``."""
    if tile is None:
        return module(x)
    return apply(lambda piece, _: module(piece), x, tile=tile, halo=reach(module), down=down)


def part(tile: int | None, divisor: int) -> int | None:
    """A tile side for a map that is ``divisor`` times as coarse, or as costly; None stays None."""
    return None if tile is None else max(1, tile // divisor)


def reach(*modules: nn.Module) -> int:
    """How far the output of these modules' convolutions, one after the other, sees, in pixels of the input.

    The halo that they need. Shortcuts past convolutions see less; padding is taken to be that which keeps the size, or
    divides it by the stride (TensorFlow's "same" pads more on the far side). A 3x3 convolution behind an up-sampling by
    2 is counted as if before it, which is enough for both: half a pixel each.
    """
    far, step = 0, 1
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                kernel, stride = layer.kernel_size[0], layer.stride[0]
                far += step * (kernel - 1 - max(0, kernel - stride) // 2)
                step *= stride
    return far


def check(tile: int | None) -> None:
    """Refuse a tile side that is too small. Raises `UserError`."""
    if tile is not None and tile < SMALLEST:
        raise UserError(f"test.tile={tile}: must be at least {SMALLEST} pixels, 0 for the whole image, or auto")


def choose(
    height: int, width: int, device: torch.device | str, setting: int | str = "auto", exact: bool = True
) -> int | None:
    """The tile side for an image of that size, None for the whole at once.

    ``setting`` is ``auto``, 0 (the whole) or a side in pixels. ``auto`` takes images of up to two million pixels
    whole if they fit into the memory that is free, others in tiles of 1024, or smaller ones where memory is scarce.
    That is for tiles that are ``exact``: others give other numbers, which must not follow from the memory that happens
    to be free, so that ``auto`` then takes the whole or raises a MemoryError. Raises `UserError` for another setting.
    """
    if setting != "auto":
        try:
            side = int(setting) or None
        except ValueError:
            raise UserError(
                f"test.tile={quoted(setting)}: must be auto, 0 for the whole image, or a side in pixels"
            ) from None
        check(side)
        return side
    pixels, free = height * width, memory.free_memory(torch.device(device))
    if not exact:
        if pixels * WHOLE_BYTES > free:
            raise MemoryError
        return None
    if pixels <= WHOLE_PIXELS and pixels * WHOLE_BYTES <= free:
        return None
    for side in SIDES:
        if pixels * PICTURE_BYTES + min(pixels, side * side) * TILE_BYTES <= free:
            return side
    return SMALLEST


def _cuts(size: int, tile: int, halo: int, down: int, blend: int) -> list[Cut]:
    """As few tiles as needed, of nearly equal size, along an axis."""
    units = size // down
    count = -(-units // max(1, tile // down))
    halo = -(-halo // down) * down
    edges = [k * units // count * down for k in range(count + 1)]
    cuts = [Cut(a, b, slice(max(0, a - halo), min(size, b + halo))) for a, b in itertools.pairwise(edges)]
    if count > 1 and min(cut.stop - cut.start for cut in cuts) < 2 * blend:
        raise ValueError(f"tiles of {tile} along {size} pixels are too narrow to fade over {blend=} on either side")
    return cuts


def _paste(cut: Cut, size: int, up: int, down: int, blend: int) -> tuple[slice, slice, Tensor]:
    """Along an axis: where in the output a tile goes, which part of its own output, and with what weights."""
    low, high = (k * up // down for k in (cut.start, cut.stop))
    before, after = (0 if end else blend * up // down for end in (cut.start == 0, cut.stop == size))
    origin = cut.seen.start * up // down
    weights = torch.ones(high - low + before + after)
    if before:
        weights[: 2 * before] = _ramp(2 * before)
    if after:
        weights[-2 * after :] *= _ramp(2 * after).flip(0)
    to = slice(low - before, high + after)
    return to, slice(to.start - origin, to.stop - origin), weights


def _ramp(n: int) -> Tensor:
    """From 0 to 1 in ``n`` steps, at their centres; with its mirror image it sums to one."""
    return ((torch.arange(n) + 0.5) * (math.pi / 2 / n)).sin() ** 2
