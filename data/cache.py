"""Decoded images in memory that the processes which read for one training run share."""

import mmap
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import images
from data.pixels import Pixels
from utils import memory
from utils.errors import UserError

EMPTY, BEING_WRITTEN, READY = range(3)


class Cache:
    """Reads images as `images` does, and decodes each that was announced (`add`) once, as long as there is room.

    Up to ``gib`` GiB of 8-bit steps are kept; 0 keeps none. Memory is taken as images come, none beforehand, and
    all workers forked from this process share it, both ways: whoever decodes an image spares the others that. Where
    workers are spawned instead, theirs is a cache of 0. What is not 8-bit (16-bit grey, depth in fractions) is decoded
    anew every time. A file that changes during the run is not read again.

    What is in stays in, and when the room is used up, nothing more comes in: a stream shows every image once an
    epoch, in an order drawn anew. An image just decoded is wanted again in the next epoch only, and no image that is
    in already is likely to be wanted later than that: to put it in another's place gains nothing.

    Of every image and depth map ``border`` pixels are cut from all sides first, and what is larger is then shrunk to
    a short side of ``short_side`` pixels (antialiased; 0: not), so that a small network's views of large photographs
    are read once and kept small.

    Raises `UserError` where less memory than that is free: it would end the run, and only when it is nearly full.
    """

    def __init__(self, gib: float = 0.0, border: int = 0, short_side: int = 0):
        size, self.border, self.short_side = int(gib * 2**30), border, short_side
        self._rows: dict[tuple, np.ndarray] = {}  # (how it is decoded, path) -> state, offset, height, width, channels
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

    def __reduce__(self):  # what a spawned worker gets
        return Cache, (0.0, self.border, self.short_side)

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return int(self._used[0])

    def add(self, pictures: Iterable[Path] = (), depth: Iterable[Path] = ()) -> None:
        """Announce what may be kept, before workers are forked: they could not tell one another of new names."""
        if self._memory is None:
            return
        asked = [(images.decode, path) for path in pictures] + [(images.decode_depth, path) for path in depth]
        new = [key for key in dict.fromkeys(asked) if key not in self._rows]
        if new:
            table = np.frombuffer(_shared(len(new) * 5 * 8), np.int64).reshape(len(new), 5)
            self._rows |= zip(new, table, strict=True)

    def picture(self, path: Path) -> Pixels:
        """An image (3,H,W). Raises `UserError` as `images.read`."""
        return Pixels(self._decoded(images.decode, path))

    def depth(self, path: Path) -> Pixels:
        """A depth map (1,H,W). Raises `UserError` as `images.read_depth`."""
        return images.depth_pixels(self._decoded(images.decode_depth, path))

    def _decoded(self, decode: Callable[[Path], Tensor], path: Path) -> Tensor:
        row = self._rows.get((decode, path))
        if row is None:
            return self._small(decode(path), path)
        with self._lock:
            state, offset, *shape = row.tolist()
        if state == READY:
            return self._place(offset, shape)
        values = self._small(decode(path), path)
        if state == EMPTY and values.dtype == torch.uint8:
            self._keep(row, values)
        return values

    def _small(self, values: Tensor, path: Path) -> Tensor:
        """Without the border, and at the short side that is kept; 8-bit steps stay such."""
        height, width = (side - 2 * self.border for side in values.shape[1:])
        if min(height, width) < 1:
            raise UserError(f"{path}: nothing is left without data.border={self.border} pixels; set a smaller one")
        values = values[:, self.border : self.border + height, self.border : self.border + width]
        scale = self.short_side / min(height, width)
        if not 0 < scale < 1:
            return values
        size = [max(self.short_side, round(side * scale)) for side in (height, width)]
        small = F.interpolate(values[None].float(), size, mode="bilinear", antialias=True)[0]
        return small.round_().to(values.dtype) if values.dtype == torch.uint8 else small

    def _keep(self, row: np.ndarray, values: Tensor) -> None:
        """Copy (C,H,W) to where there is room, if there is and no other process was quicker."""
        with self._lock:
            offset = int(self._used[0])
            if row[0] != EMPTY or offset + values.numel() > len(self._memory):
                return
            self._used[0] += values.numel()
            shape = (*values.shape[1:], values.shape[0])
            row[:] = (BEING_WRITTEN, offset, *shape)
        self._place(offset, shape).copy_(values)
        with self._lock:  # which also keeps other cores from seeing READY before the pixels
            row[0] = READY

    def _place(self, offset: int, shape: tuple[int, int, int]) -> Tensor:
        """(C,H,W) of a place that holds (H,W,C), which is how images come from the decoder."""
        height, width, channels = shape
        place = self._memory[offset : offset + height * width * channels]
        return place.view(height, width, channels).permute(2, 0, 1)


def _shared(size: int) -> mmap.mmap:
    """Zeros that forked processes share; they take memory when they are written. Not bounded by /dev/shm."""
    try:
        return mmap.mmap(-1, size)
    except OSError as error:
        raise UserError(
            f"data.cache: no {size / 2**30:.1f} GiB can be had ({error.strerror}); set a smaller data.cache, or 0"
        ) from error
