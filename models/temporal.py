"""Frames in order: what is found of the haze is averaged over time, so that the dehazed clip does not flicker.

A network that sees each frame by itself finds another airlight in every one, and J = (I - A) / t + A multiplies that by
1/t - 1. Haze changes slowly, so A is averaged over seconds. So is t, at the size at which the network finds it, moved
along with the camera and only where the image stayed the same; edges are then taken from the present frame (`fine`).
At a cut all begins anew.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.method import Method
from utils import physics

AIRLIGHT = 4  # A is averaged over so many times as long as t
SAME = 0.1  # a pixel that differs by this is another one, and its t is that of the present frame
CUT = 0.6  # a frame that differs from the last by this share of its contrast is the first of another scene ...
LEAST_CUT = 0.02  # ... if it differs by that much at all: noise in plain fog does not count
PEAK = 0.05  # a weaker peak of the phase correlation tells no movement


class Steady:
    """``method`` on the frames of a clip, one call a frame: (1,3,H,W) in [0,1] -> as `Method.estimate`.

    ``seconds`` over which t is averaged (0: frame by frame), at ``rate`` frames a second; the network sees every
    ``every``-th frame, others take what was found before, moved along; ``strength`` as of `Method.estimate`. ``cuts``
    counts the scenes that began after the first.
    """

    def __init__(self, method: Method, seconds: float, rate: float = 25.0, strength: float = 1.0, every: int = 1):
        self.method, self.strength, self.cuts = method, strength, 0
        self.every = every if seconds else 1
        self.keep = [math.exp(-self.every / (seconds * k * rate)) if seconds else 0.0 for k in (1, AIRLIGHT)]
        self.view: Tensor | None = None  # the last frame, at the size of its t
        self.number = 0

    def __call__(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        self.number += 1
        return self.follow(hazy, self.find(hazy, self.number - 1, tile), tile)

    @torch.no_grad()
    def find(self, hazy: Tensor, number: int, tile: int | None = None) -> tuple[Tensor, Tensor] | None:
        """The haze of frame ``number``, if the network is to see that one; may go beside that of other frames."""
        return None if number % self.every else self.method.haze(hazy, tile)

    @torch.no_grad()
    def follow(self, hazy: Tensor, haze: tuple[Tensor, Tensor] | None, tile: int | None = None) -> dict[str, Tensor]:
        """The next frame and what `find` gave for it: this part alone must go in order."""
        same = self.view is not None and self.size == hazy.shape
        if not same:
            haze = haze or self.method.haze(hazy, tile)
        size = haze[0].shape[2:] if haze else self.t.shape[2:]
        view = F.interpolate(hazy, size, mode="bilinear", antialias=True)
        before = self._moved(view) if same else None
        if before is not None and is_cut(before[0], view, before[2]):
            self.cuts, before = self.cuts + 1, None
        if before is None:
            self.count, (self.t, self.A) = 1, haze or self.method.haze(hazy, tile)
        else:
            self._average(view, haze, *before)
        self.view, self.size = view, hazy.shape
        t = self.method.fine(self.t, hazy)
        return {"clear": physics.restore_partly(hazy, t, self.A, self.strength), "transmission": t, "airlight": self.A}

    def _moved(self, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last frame and its t, moved along with the camera to where they are in ``view``, and where known."""
        shift = movement(self.view.mean(1), view.mean(1))
        found, there = moved(torch.cat([self.view, self.t], 1), shift)
        return found[:, :3], found[:, 3:], there

    def _average(
        self, view: Tensor, haze: tuple[Tensor, Tensor] | None, before: Tensor, t: Tensor, there: Tensor
    ) -> None:
        if haze is None:
            self.t = t
            return
        self.count += 1
        short, long = (min(keep, 1 - 1 / self.count) for keep in self.keep)  # at first a plain mean
        differs = (before - view).abs().mean(1, keepdim=True)
        keep = short * there * (1 - differs / SAME).clamp(min=0)
        self.t, self.A = torch.lerp(haze[0], t, keep), torch.lerp(haze[1], self.A, long)


def is_cut(before: Tensor, view: Tensor, there: Tensor) -> bool:
    """Does another scene begin with ``view`` (1,3,h,w)? ``before``: the last frame, moved along; known ``there``."""
    share = there.mean()
    if share < 0.25:
        return True
    differs = ((before - view).abs() * there).mean() / share
    contrast = ((view - view.mean((2, 3), keepdim=True)).abs() * there).mean() / share
    return bool(differs > max(LEAST_CUT, CUT * contrast))


def movement(before: Tensor, view: Tensor) -> tuple[float, float]:
    """By how many pixels, down and right, the scene moved between two grey frames (1,h,w): phase correlation."""
    h, w = view.shape[1:]
    window = torch.outer(*(torch.hann_window(side, periodic=False, device=view.device) for side in (h, w)))
    first, second = (torch.fft.rfft2((x - x.mean()) * window) for x in (before, view))
    cross = second * first.conj()
    peaks = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-6), (h, w))[0]
    row, column = divmod(int(peaks.argmax()), w)
    if peaks[row, column] < PEAK:
        return 0.0, 0.0
    down = _centre(peaks[:, column], row)
    right = _centre(peaks[row], column)
    return (down + h / 2) % h - h / 2, (right + w / 2) % w - w / 2


def _centre(line: Tensor, place: int) -> float:
    """Where between pixels the peak at ``place`` of a line lies, by its larger neighbour; the line is a ring."""
    left, at, right = (max(0.0, float(line[(place + k) % len(line)])) for k in (-1, 0, 1))
    return place + (right / (right + at) if right > left else -left / (left + at))


def moved(x: Tensor, shift: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """``x`` (1,C,h,w) moved by so many pixels down and right, its borders repeated; and (h,w) 1 where it is known."""
    h, w = x.shape[2:]
    if shift == (0.0, 0.0):
        return x, x.new_ones(h, w)
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) - s for n, s in zip((h, w), shift, strict=True))
    y, z = torch.meshgrid((2 * rows + 1) / h - 1, (2 * columns + 1) / w - 1, indexing="ij")
    found = F.grid_sample(x, torch.stack([z, y], 2)[None], padding_mode="border", align_corners=False)
    known = [((place >= 0) & (place <= n - 1)).to(x.dtype) for place, n in ((rows, h), (columns, w))]
    return found, torch.outer(*known)
