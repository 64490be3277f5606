"""A cache of decoded images in memory, shared by the workers of a training run."""

import dataclasses
import mmap
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import images
from data.pixels import Pixels
from utils import memory
from utils.errors import UserError

EMPTY, BEING_WRITTEN, READY = range(3)
ROW = 8  # numbers: state, offset, the shape (height, width, channels) of the values, and the rest of `_Entry`


class _Entry(NamedTuple):
    """Decoded values (C,H,W) as they are kept, and what is known only before they are cut and reduced."""

    values: Tensor
    height: int  # of the whole image
    width: int
    peak: int  # the maximum of a whole 8-bit depth map


class Cache:
    """Reads images like `images`, and decodes every image announced by `add` only once, while there is space.

    Up to ``gib`` GiB of 8-bit values are kept; 0 keeps none. Memory is allocated as images arrive, and all workers
    forked from this process share it: an image decoded by one is available to all. A spawned worker gets a cache of
    size 0. Images that are not 8-bit (16-bit grey, float depth) are decoded every time. A file that changes during the
    run is not read again.

    Entries are never replaced; when the cache is full, nothing is added. A stream shows every image once an epoch in
    a new order, so an image just decoded is not needed before the next epoch, and replacing another one by it gains
    nothing.

    First ``border`` pixels are cut from all sides of every image and depth map, and larger ones are then reduced to a
    short side of ``short_side`` pixels (antialiased; 0: never), so that large photographs are read once and kept small.

    Raises `UserError` if less memory than ``gib`` is free, since the run would fail only once the cache is nearly full.
    """

    def __init__(self, gib: float = 0.0, border: int = 0, short_side: int = 0):
        size = int(gib * 2**30)
        self.border = border
        self.short_side = short_side
        self._rows: dict[tuple, np.ndarray] = {}  # (decoder, path) -> `ROW` numbers
        self._memory: Tensor | None = None
        self._used = np.zeros(1, np.int64)
        if size == 0:
            return
        free = memory.free_memory(torch.device("cpu"))
        if size > free:
            raise UserError(
                f"data.cache={gib:g}: only {free / 2**30:.1f} GiB of memory are free, which the network needs, too; "
                "set a smaller data.cache, or 0 for none"
            )
        self._lock = multiprocessing.Lock()
        self._used = np.frombuffer(_shared(8), np.int64)
        self._memory = torch.frombuffer(_shared(size), dtype=torch.uint8)

    def __reduce__(self):  # for spawned workers
        return Cache, (0.0, self.border, self.short_side)

    @property
    def used(self) -> int:
        """Bytes in use."""
        return int(self._used[0])

    def add(self, paths: Iterable[Path] = (), depth: Iterable[Path] = ()) -> None:
        """Announce the files that may be kept, before workers are forked: they cannot share entries added later."""
        if self._memory is None:
            return
        keys = [(images.decode, path) for path in paths] + [(images.decode_depth, path) for path in depth]
        new = [key for key in dict.fromkeys(keys) if key not in self._rows]
        if new:
            table = np.frombuffer(_shared(len(new) * ROW * 8), np.int64).reshape(len(new), ROW)
            self._rows |= zip(new, table, strict=True)

    def image(self, path: Path, crop: Callable[[Tensor], Tensor] = lambda values: values) -> Pixels:
        """An image (3,H,W). Raises `UserError` as `images.read`.

        ``crop`` cuts the decoded values first; an image must be asked for with the same one every time.
        """
        entry = self._get(images.decode, path, crop)
        return Pixels(entry.values, whole=(entry.height, entry.width))

    def depth(self, path: Path) -> Pixels:
        """A depth map (1,H,W). Raises `UserError` as `images.read_depth`."""
        entry = self._get(images.decode_depth, path)
        pixels = images.depth_pixels(entry.values, entry.peak)
        return dataclasses.replace(pixels, whole=(entry.height, entry.width))

    def _get(self, decode: Callable, path: Path, crop: Callable[[Tensor], Tensor] = lambda values: values) -> _Entry:
        row = self._rows.get((decode, path))
        state = EMPTY
        if row is not None:
            with self._lock:
                state, offset, *numbers = row.tolist()
            if state == READY:
                return _Entry(self._view(offset, numbers[:3]), *numbers[3:])
        values = crop(decode(path))
        peak = int(values.max()) if decode is images.decode_depth else 0
        entry = _Entry(self._reduced(values, path), *values.shape[1:], peak)
        if row is not None and state == EMPTY and values.dtype == torch.uint8:
            self._store(row, entry)
        return entry

    def _reduced(self, values: Tensor, path: Path) -> Tensor:
        """``values`` without the border, reduced to ``short_side``; 8-bit values stay 8-bit."""
        height, width = (side - 2 * self.border for side in values.shape[1:])
        if min(height, width) < 1:
            raise UserError(f"{path}: data.border={self.border} pixels leave nothing of it; set a smaller one")
        values = values[:, self.border : self.border + height, self.border : self.border + width]
        scale = self.short_side / min(height, width)
        if not 0 < scale < 1:
            return values
        size = [max(self.short_side, round(side * scale)) for side in (height, width)]
        small = F.interpolate(values[None].float(), size, mode="bilinear", antialias=True)[0]
        return small.round_().to(values.dtype) if values.dtype == torch.uint8 else small

    def _store(self, row: np.ndarray, entry: _Entry) -> None:
        """Copy the values of ``entry`` into the cache, if there is space and no other process has stored it since."""
        values = entry.values
        with self._lock:
            offset = int(self._used[0])
            if row[0] != EMPTY or offset + values.numel() > len(self._memory):
                return
            self._used[0] += values.numel()
            shape = (*values.shape[1:], values.shape[0])
            row[:] = (BEING_WRITTEN, offset, *shape, *entry[1:])
        self._view(offset, shape).copy_(values)
        with self._lock:  # also a memory barrier: other cores must not see READY before the pixels
            row[0] = READY

    def _view(self, offset: int, shape: tuple[int, int, int]) -> Tensor:
        """The entry at ``offset`` as (C,H,W); it is stored as (H,W,C), the decoder's order."""
        height, width, channels = shape
        values = self._memory[offset : offset + height * width * channels]
        return values.view(height, width, channels).permute(2, 0, 1)


def _shared(size: int) -> mmap.mmap:
    """Zeros shared by forked processes, allocated when written. Not limited by /dev/shm."""
    try:
        return mmap.mmap(-1, size)
    except OSError as error:
        raise UserError(
            f"data.cache: {size / 2**30:.1f} GiB cannot be allocated ({error.strerror}); set a smaller data.cache, or 0"
        ) from error
