"""Temporal averaging of the estimated haze, so that a dehazed clip does not flicker.

A network that processes frames independently estimates a slightly different airlight in each, and J = (I - A) / t + A
multiplies the difference by 1/t - 1. Haze changes slowly, so A is averaged over seconds. So is t, at the size at which
the network estimates it, shifted with the camera and only where the image stayed the same; edges are then taken from
the current frame (`Method.upsample_transmission`). A cut resets all averages.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.method import Method
from utils import physics

AIRLIGHT_FACTOR = 4  # A is averaged over this many times the duration of t
PIXEL_CHANGE = 0.1  # a pixel that differs by this has changed: its t is that of the current frame
CUT_CONTRAST = 0.6  # a frame that differs from the previous one by this share of its contrast begins a new scene ...
CUT_MINIMUM = 0.02  # ... if it differs by at least this: noise in plain fog is not a cut
PEAK = 0.05  # a weaker peak of the phase correlation counts as no movement


class TemporalFilter:
    """``method`` on the frames of a clip, one call a frame: (1,3,H,W) in [0,1] -> as `Method.estimate`.

    ``seconds`` over which t is averaged (0: frame by frame), at ``rate`` frames a second; the network processes every
    ``every``-th frame, others reuse the previous haze, shifted; ``strength`` as in `Method.estimate`. ``cuts`` counts
    the scenes after the first.
    """

    def __init__(self, method: Method, seconds: float, rate: float = 25.0, strength: float = 1.0, every: int = 1):
        self.method = method
        self.strength = strength
        self.every = every if seconds else 1
        self.keep = [math.exp(-self.every / (seconds * k * rate)) if seconds else 0.0 for k in (1, AIRLIGHT_FACTOR)]
        self.previous: Tensor | None = None  # the previous frame, at the size of its t
        self.number = self.cuts = 0

    def __call__(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        self.number += 1
        return self.dehaze_next(hazy, self.estimate_haze(hazy, self.number - 1, tile), tile)

    @torch.no_grad()
    def estimate_haze(self, hazy: Tensor, number: int, tile: int | None = None) -> tuple[Tensor, Tensor] | None:
        """The haze of frame ``number``, None if the network skips it; may run in parallel with other frames."""
        return None if number % self.every else self.method.estimate_haze(hazy, tile)

    @torch.no_grad()
    def dehaze_next(
        self, hazy: Tensor, haze: tuple[Tensor, Tensor] | None, tile: int | None = None
    ) -> dict[str, Tensor]:
        """Dehaze the next frame with its result of `estimate_haze`; must be called in the order of the frames."""
        same_size = self.previous is not None and self.size == hazy.shape
        if not same_size:
            haze = haze or self.method.estimate_haze(hazy, tile)
        size = haze[0].shape[2:] if haze else self.t.shape[2:]
        frame = F.interpolate(hazy, size, mode="bilinear", antialias=True)
        history = self._shifted(frame) if same_size else None
        if history is not None and is_cut(history[0], frame, history[2]):
            self.cuts += 1
            history = None
        if history is None:
            self.count = 1
            self.t, self.A = haze or self.method.estimate_haze(hazy, tile)
        else:
            self._average(frame, haze, *history)
        self.previous, self.size = frame, hazy.shape
        t = self.method.upsample_transmission(self.t, hazy)
        return {"clear": physics.restore_partly(hazy, t, self.A, self.strength), "transmission": t, "airlight": self.A}

    def _shifted(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The previous frame and its t, shifted to match ``frame``, and the mask (h,w) of known pixels."""
        shift = movement(self.previous.mean(1), frame.mean(1))
        maps, known = shifted(torch.cat([self.previous, self.t], 1), shift)
        return maps[:, :3], maps[:, 3:], known

    def _average(
        self, frame: Tensor, haze: tuple[Tensor, Tensor] | None, previous: Tensor, t: Tensor, known: Tensor
    ) -> None:
        if haze is None:
            self.t = t
            return
        self.count += 1
        short, long = (min(keep, 1 - 1 / self.count) for keep in self.keep)  # at first a plain mean
        change = (previous - frame).abs().mean(1, keepdim=True)
        keep = short * known * (1 - change / PIXEL_CHANGE).clamp(min=0)
        self.t = torch.lerp(haze[0], t, keep)
        self.A = torch.lerp(haze[1], self.A, long)


def is_cut(previous: Tensor, frame: Tensor, known: Tensor) -> bool:
    """Does ``frame`` (1,3,h,w) begin a new scene? ``previous``: the last frame, shifted; ``known``: its mask (h,w)."""
    share = known.mean()
    if share < 0.25:
        return True
    change = ((previous - frame).abs() * known).mean() / share
    contrast = ((frame - frame.mean((2, 3), keepdim=True)).abs() * known).mean() / share
    return bool(change > max(CUT_MINIMUM, CUT_CONTRAST * contrast))


def movement(previous: Tensor, frame: Tensor) -> tuple[float, float]:
    """By how many pixels, down and right, the scene moved between two grey frames (1,h,w): phase correlation."""
    h, w = frame.shape[1:]
    window = torch.outer(*(torch.hann_window(side, periodic=False, device=frame.device) for side in (h, w)))
    first, second = (torch.fft.rfft2((x - x.mean()) * window) for x in (previous, frame))
    cross = second * first.conj()
    peaks = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-6), (h, w))[0]
    row, column = divmod(int(peaks.argmax()), w)
    if peaks[row, column] < PEAK:
        return 0.0, 0.0
    down = _subpixel_peak(peaks[:, column], row)
    right = _subpixel_peak(peaks[row], column)
    return (down + h / 2) % h - h / 2, (right + w / 2) % w - w / 2


def _subpixel_peak(line: Tensor, index: int) -> float:
    """The position of the peak at ``index`` of a circular line, refined by its larger neighbour."""
    left, peak, right = (max(0.0, float(line[(index + k) % len(line)])) for k in (-1, 0, 1))
    return index + (right / (right + peak) if right > left else -left / (left + peak))


def shifted(x: Tensor, shift: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """``x`` (1,C,h,w) shifted by pixels (down, right), its borders repeated; and a mask (h,w), 1 where it is known."""
    h, w = x.shape[2:]
    if shift == (0.0, 0.0):
        return x, x.new_ones(h, w)
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) - s for n, s in zip((h, w), shift, strict=True))
    y, z = torch.meshgrid((2 * rows + 1) / h - 1, (2 * columns + 1) / w - 1, indexing="ij")
    sampled = F.grid_sample(x, torch.stack([z, y], 2)[None], padding_mode="border", align_corners=False)
    known = [((index >= 0) & (index <= n - 1)).to(x.dtype) for index, n in ((rows, h), (columns, w))]
    return sampled, torch.outer(*known)
