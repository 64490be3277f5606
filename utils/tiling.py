"""Large images in bounded memory: computation in tiles, and the choice of the tile size.

Local functions (convolutions) are computed on tiles with a halo as wide as their receptive field, which is then cut
off: the results equal those of the whole map, up to rounding. The caller must compute global values (an airlight, a
mean over the image, coordinates) from the whole map. Other functions are computed on overlapping tiles, which are
cross-faded (``blend``); the result is close to that of the whole map, but not equal.
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
SIDES = (1024, 768, 512, 384, 256, SMALLEST)  # tiling is exact and 1024 costs a few percent: no larger ones are needed
WHOLE_PIXELS = 2_000_000  # images up to this size are processed whole if memory allows
# Bytes per pixel that NeDR of width 64 needs in float32 on the CPU, without its weights and the image itself.
WHOLE_BYTES = 1500  # of an image processed whole (measured: 1160)
IMAGE_BYTES = 120  # of an image processed in tiles
TILE_BYTES = 1500  # of a tile (together 2.6 GB for 5436x3612)


class Window(NamedTuple):
    """The position of a piece in the map that it was cut from."""

    rows: slice
    columns: slice
    size: tuple[int, int]  # (height, width) of the whole map

    def cut(self, x: Tensor) -> Tensor:
        """The same piece of another map of that size: (...,H,W) -> (...,h,w)."""
        return x[..., self.rows, self.columns]


class Cut(NamedTuple):
    """One tile along one axis: from ``start`` to ``stop``, computed from the pixels ``source``, with the halo."""

    start: int
    stop: int
    source: slice


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
    """``f`` on every tile of ``x``, combined. (N,C,H,W) -> (N,C',H up/down,W up/down).

    ``f(piece, window)`` returns ``up/down`` times as many pixels a side as the piece has, with the same type and
    channels for every piece. Tiles are at most ``tile`` pixels of ``x`` a side, begin at multiples of ``down`` (H and W
    must be multiples of it) and have a halo of ``halo`` pixels on every side, less at the borders of ``x``. With
    ``tile=None`` or a tile larger than ``x`` this is ``f`` of the whole, with gradients.

    ``blend``, at most ``halo``, cross-fades neighbours over as many pixels on either side of their common border, by
    raised-cosine weights that sum to one; tiles must be at least twice as wide.
    """
    height, width = x.shape[-2:]
    if tile is None or tile >= max(height, width):
        return f(x, Window(slice(0, height), slice(0, width), (height, width)))
    if height % down or width % down or blend > halo:
        raise ValueError(f"tiles of {height}x{width}: down={down} must divide both, and {blend=} not exceed {halo=}")
    all_columns = _cuts(width, tile, halo, down, blend)
    out = None
    for rows in _cuts(height, tile, halo, down, blend):
        if x.device.type == "cpu":
            memory.release_memory()  # otherwise the fragmented heap grows with each row
        for columns in all_columns:
            y = f(x[..., rows.source, columns.source], Window(rows.source, columns.source, (height, width)))
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


def apply_module(module: nn.Module, x: Tensor, *, tile: int | None, down: int = 1) -> Tensor:
    """``module``, a sequence of convolutions that divide the size by ``down``, on every tile of ``x``."""
    if tile is None:
        return module(x)
    return apply(lambda piece, _: module(piece), x, tile=tile, halo=reach(module), down=down)


def coarse_side(tile: int | None, divisor: int) -> int | None:
    """The tile side for a map that is ``divisor`` times as coarse, or as costly; None for None."""
    return None if tile is None else max(1, tile // divisor)


def reach(*modules: nn.Module) -> int:
    """The radius of the receptive field of these modules' convolutions in sequence, in pixels of the input.

    It is the halo that they need. Shortcuts past convolutions have a smaller radius; the padding is assumed to keep the
    size, or to divide it by the stride (TensorFlow's "same" pads more on the far side). A 3x3 convolution after an
    up-sampling by 2 is counted as if before it, which is enough for both: half a pixel each.
    """
    radius = 0
    step = 1
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                kernel, stride = layer.kernel_size[0], layer.stride[0]
                radius += step * (kernel - 1 - max(0, kernel - stride) // 2)
                step *= stride
    return radius


def check(tile: int | None) -> None:
    """Refuse a tile side that is too small. Raises `UserError`."""
    if tile is not None and tile < SMALLEST:
        raise UserError(f"test.tile={tile}: must be at least {SMALLEST} pixels, 0 for the whole image, or auto")


def choose(
    height: int, width: int, device: torch.device | str, setting: int | str = "auto", exact: bool = True
) -> int | None:
    """The tile side for an image of that size, None for the whole at once.

    ``setting`` is ``auto``, 0 (the whole) or a side in pixels. ``auto`` processes images of up to two million pixels
    whole if they fit into the free memory, others in tiles of 1024, or smaller ones where memory is scarce. That is for
    tiles that are ``exact``: the results of others must not depend on how much memory is free, so that ``auto`` then
    chooses the whole or raises a MemoryError. Raises `UserError` for another setting.
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
        if pixels * IMAGE_BYTES + min(pixels, side * side) * TILE_BYTES <= free:
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
    """Along an axis: the slice of the whole output, the slice of the tile's output that it gets, and its weights."""
    low, high = (k * up // down for k in (cut.start, cut.stop))
    before, after = (0 if end else blend * up // down for end in (cut.start == 0, cut.stop == size))
    origin = cut.source.start * up // down
    weights = torch.ones(high - low + before + after)
    if before:
        weights[: 2 * before] = _ramp(2 * before)
    if after:
        weights[-2 * after :] *= _ramp(2 * after).flip(0)
    to = slice(low - before, high + after)
    return to, slice(to.start - origin, to.stop - origin), weights


def _ramp(n: int) -> Tensor:
    """Weights from 0 to 1, at the centres of ``n`` steps; their sum with the reversed weights is one."""
    return ((torch.arange(n) + 0.5) * (math.pi / 2 / n)).sin() ** 2
