"""PSNR and SSIM under named protocols: figures of different protocols differ by more than methods do.

A `Protocol` has the few decisions that change the numbers. SSIM is that of Wang, Bovik, Sheikh, Simoncelli, "Image
quality assessment: from error visibility to structural similarity", TIP 2004, eq. 13, with K1 = 0.01 and K2 = 0.03.
Images are measured on their device, in float64, in parts that fit a cache: the largest benchmark images have 20 million
pixels.
"""

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError, nearest, quoted

LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "scikit-image")
KINDS = ("psnr", "ssim")
SIGMA = 1.5  # pixels, of every Gaussian window
K1, K2 = 0.01, 0.03
TILE = {"cpu": 256, "cuda": 2048}  # side in pixels: four float64 maps of a tile stay in a cache, or fill a GPU
EDGE = 1e-4  # grey levels: k/255 in float32 times 255 may end this far below k, and truncation must leave it k

PIXELS = {
    "round": "8 bit by rounding",
    "truncate": "8 bit by truncation (8-bit images stay as they are)",
    "float": "float, clamped to [0,1]",
}
COLOURS = {
    "rgb": "RGB",
    "grey": "grey (0.299 R + 0.587 G + 0.114 B, rounded to 8 bit)",
    "y": "Y of BT.601 (16 to 235, not rounded)",
}
WINDOWS = {"gaussian": f"Gaussian (sigma {SIGMA})", "uniform": "uniform"}
BORDERS = {"valid": "valid border", "zero": "zero padding"}
POOLING = {
    None: "at full size",
    "true": "average-pooled by r = max(1, round(min(H,W)/256)) to (int(H/r),int(W/r))",
    "padded": "average-pooled by r = max(1, round(min(h,w)/256)) to (int(h/r),int(w/r)), h = 4 int(H/4) + 4, w alike",
}


@dataclass(frozen=True)
class Protocol:
    """The decisions that determine a figure.

    ``side`` is the side of SSIM's window in pixels, ``pooled`` the size from which its average pooling is computed, if
    any; with ``sample`` its covariances are divided by N-1, not N.
    """

    name: str
    used_by: str
    pixels: Literal["round", "truncate", "float"] = "round"
    psnr_of: Literal["rgb", "y"] = "rgb"
    ssim_of: Literal["rgb", "grey", "y"] = "rgb"
    window: Literal["gaussian", "uniform"] = "gaussian"
    side: int = 11
    border: Literal["valid", "zero"] = "valid"
    pooled: Literal["true", "padded"] | None = None
    sample: bool = False

    @property
    def range(self) -> int:
        """The data range: the difference between white and black."""
        return 1 if self.pixels == "float" else 255

    def describe(self) -> dict[str, str]:
        """A description for reports and JSON: name, pixels, psnr, ssim, used by."""
        window = f"{WINDOWS[self.window]} window {self.side}"
        ssim = [COLOURS[self.ssim_of], POOLING[self.pooled], window, BORDERS[self.border], f"data range {self.range}"]
        ssim += ["sample covariance (N-1)"] if self.sample else []
        ssim += ["mean over RGB"] if self.ssim_of == "rgb" else []
        return {
            "name": self.name,
            "pixels": PIXELS[self.pixels],
            "psnr": f"{COLOURS[self.psnr_of]}, at full size, data range {self.range}, per image, then averaged",
            "ssim": ", ".join([*ssim, "per image, then averaged"]),
            "used by": self.used_by,
        }


_ALL = (
    Protocol("ours", "this code base; SSIM as scikit-image with gaussian_weights=True, use_sample_covariance=False"),
    Protocol("d4", "D4 and NeDR", pixels="truncate", ssim_of="grey", window="uniform", side=51, sample=True),
    Protocol("dehazeformer", "DehazeFormer, ConvIR, OKNet; SSIM as pytorch_msssim", pixels="float", pooled="true"),
    Protocol("ffa", "FFA-Net", pixels="float", border="zero"),
    Protocol("skimage-default", "many; SSIM as scikit-image without options", window="uniform", side=7, sample=True),
    Protocol("y-channel", "BasicSR with test_y_channel and code that follows it", psnr_of="y", ssim_of="y"),
    Protocol("aknet", "AKNet; SSIM as pytorch_msssim", pixels="float", pooled="padded"),
)
PROTOCOLS = {each.name: each for each in _ALL}


def protocol(name: str) -> Protocol:
    """The protocol of that name; raises `UserError` with the nearest name if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"there is no protocol '{quoted(name)}'{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def psnr(a: Tensor, b: Tensor, protocol: str = "ours") -> float:
    """Peak signal-to-noise ratio in dB of two images (3,H,W), float in [0,1]; inf if they are equal in the protocol.

    Raises `UserError` as `figures` does.
    """
    return figures(a, b, [protocol], ["psnr"])[f"{protocol}.psnr"]


def ssim(a: Tensor, b: Tensor, protocol: str = "ours") -> float:
    """Structural similarity, in [-1,1], of two images (3,H,W), float in [0,1].

    nan if a side, after the protocol's pooling, is shorter than a window without padding. Raises `UserError` as
    `figures` does.
    """
    return figures(a, b, [protocol], ["ssim"])[f"{protocol}.ssim"]


@torch.no_grad()
def figures(a: Tensor, b: Tensor, protocols: Sequence[str], kinds: Sequence[str] = KINDS) -> dict[str, float]:
    """Figures of two images (3,H,W), float in [0,1], such as {"ours.psnr": 25.3, "ours.ssim": 0.91}.

    They are computed on the device of ``a``; steps that protocols share are computed once. Raises `UserError` for
    unknown protocols, different shapes, and other invalid images.
    """
    chosen = [protocol(name) for name in dict.fromkeys(protocols)]
    check(a, b)
    results = {}
    for pixels, members in groupby(sorted(chosen, key=lambda each: each.pixels), key=lambda each: each.pixels):
        x, y = _pixels(a, pixels), _pixels(b.to(a.device), pixels)
        psnr_by_colour = {}
        for each in members:
            if "psnr" in kinds:
                if each.psnr_of not in psnr_by_colour:
                    images = _colour(x, each.psnr_of), _colour(y, each.psnr_of)
                    psnr_by_colour[each.psnr_of] = _psnr(*images, each.range)
                results[f"{each.name}.psnr"] = psnr_by_colour[each.psnr_of]
            if "ssim" in kinds:
                results[f"{each.name}.ssim"] = _ssim(_prepared(x, each), _prepared(y, each), each)
    return {key: results[key] for each in chosen for kind in KINDS if (key := f"{each.name}.{kind}") in results}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that figures depend on, for decoders and metrics."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def check(a: Tensor, b: Tensor) -> None:
    """Raise `UserError` unless both are float images (3,H,W) of one shape."""
    if a.shape != b.shape:
        raise UserError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; crop one of them")
    for image in (a, b):
        if image.ndim != 3 or len(image) != 3 or not image.numel() or not image.is_floating_point():
            kind = f"{str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}"
            raise UserError(f"an image to be measured must be float in [0,1] of shape (3,H,W), not {kind}; convert it")


def _pixels(image: Tensor, pixels: str) -> Tensor:
    """(3,H,W) as the protocol measures it: uint8, or float in [0,1]."""
    if pixels == "float":
        return image.clamp(0, 1)
    out = torch.empty(image.shape, dtype=torch.uint8, device=image.device)
    for rows in _strips(image.shape, image.device):
        levels = image[:, rows].to(torch.float64, copy=True).clamp_(0, 1).mul_(255)
        out[:, rows] = levels.round_() if pixels == "round" else levels.add_(EDGE)  # the conversion truncates
    return out


def _colour(image: Tensor, colour: str) -> Tensor:
    """(3,H,W) as (3,H,W) RGB, or 8-bit RGB as (1,H,W) grey uint8 or Y float64, values from 16 to 235."""
    if colour == "rgb":
        return image
    kind = torch.uint8 if colour == "grey" else torch.float64
    out = torch.empty((1, *image.shape[1:]), dtype=kind, device=image.device)
    for rows in _strips(image.shape, image.device):
        if colour == "grey":  # in integers, halves rounded up: the same on every machine
            red, green, blue = image[:, rows].int()
            out[0, rows] = (299 * red + 587 * green + 114 * blue + 500) // 1000
        else:
            red, green, blue = image[:, rows].double()
            out[0, rows] = 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255
    return out


def _prepared(image: Tensor, each: Protocol) -> Tensor:
    """The (C,H,W) for SSIM: in the protocol's colour, and pooled to about 256 pixels if the protocol does that."""
    image = _colour(image, each.ssim_of)
    if each.pooled is None:
        return image
    height, width = image.shape[1:]
    if each.pooled == "padded":
        height, width = (height // 4 + 1) * 4, (width // 4 + 1) * 4
    ratio = max(1, round(min(height, width) / 256))
    size = int(height / ratio), int(width / ratio)  # "padded" with ratio 1 enlarges the image
    if size == image.shape[1:]:
        return image
    return torch.cat([F.adaptive_avg_pool2d(plane[None].double(), size) for plane in image])  # saves memory


def _psnr(x: Tensor, y: Tensor, data_range: int) -> float:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in _strips(x.shape, x.device):
        total += x[:, rows].double().sub_(y[:, rows]).square_().sum()
    error = float(total) / x.numel()
    return 10 * math.log10(data_range**2 / error) if error else math.inf


def _ssim(x: Tensor, y: Tensor, each: Protocol) -> float:
    """Mean SSIM of two (C,H,W), channel by channel, in tiles that overlap by the window."""
    tile = TILE.get(x.device.type, TILE["cpu"])
    halo = each.side - 1
    pad = each.side // 2 if each.border == "zero" else 0
    height, width = (side + 2 * pad - halo for side in x.shape[1:])  # of the map of window positions
    if min(height, width) < 1:
        return math.nan
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for u, v in zip(x, y, strict=True):
        for rows, columns in product(_spans(height, tile), _spans(width, tile)):
            pixels = [slice(span.start - pad, span.stop - pad + halo) for span in (rows, columns)]
            total += _similarity(_tile(u, *pixels), _tile(v, *pixels), each).sum()
    return float(total) / (len(x) * height * width)


def _tile(plane: Tensor, rows: slice, columns: slice) -> Tensor:
    """A part of (H,W) in float64, with 0 outside."""
    height, width = plane.shape
    part = plane[max(rows.start, 0) : rows.stop, max(columns.start, 0) : columns.stop].double()
    padding = (max(-columns.start, 0), max(columns.stop - width, 0), max(-rows.start, 0), max(rows.stop - height, 0))
    return F.pad(part, padding) if any(padding) else part


def _similarity(x: Tensor, y: Tensor, each: Protocol) -> Tensor:
    """SSIM at every window of two (H,W), eq. 13 of the paper, which needs only the sum of the variances."""
    maps = torch.empty((4, *x.shape), dtype=x.dtype, device=x.device)
    maps[0] = x
    maps[1] = y
    torch.mul(x, y, out=maps[2])
    torch.mul(x, x, out=maps[3]).addcmul_(y, y)
    average = partial(_box, side=each.side)
    if each.window == "gaussian":
        average = partial(_filter, weights=_gaussian(each.side))
    a, b, products, squares = average(average(maps, dim=-2), dim=-1)
    unbiased = each.side**2 / (each.side**2 - 1) if each.sample else 1.0
    c1 = (K1 * each.range) ** 2
    c2 = (K2 * each.range) ** 2
    ab = a * b
    squared_means = a.square_().addcmul_(b, b)
    covariance = products.sub_(ab).mul_(unbiased)
    variances = squares.sub_(squared_means).mul_(unbiased)
    numerator = ab.mul_(2).add_(c1).mul_(covariance.mul_(2).add_(c2))
    return numerator.div_(squared_means.add_(c1)).div_(variances.add_(c2))


def _filter(maps: Tensor, dim: int, weights: Sequence[float]) -> Tensor:
    """Weighted sums along ``dim``, of complete windows only. On a CPU ten times faster than conv2d in float64."""
    size = maps.shape[dim] - len(weights) + 1
    out = maps.narrow(dim, 0, size) * weights[0]
    for k, weight in enumerate(weights[1:], 1):
        out.add_(maps.narrow(dim, k, size), alpha=weight)
    return out


def _box(maps: Tensor, dim: int, side: int) -> Tensor:
    """Means of ``side`` along ``dim``, of complete windows only: sums of 1, 2, 4, ... pixels, combined to ``side``."""
    size = maps.shape[dim] - side + 1
    sums = maps
    power = 1  # pixels in each of ``sums``
    done = 0  # pixels in each of ``out``
    out = None
    while True:
        if side & power:
            part = sums.narrow(dim, done, size)
            out = part.clone() if out is None else out.add_(part)
            done += power
        if done == side:
            return out.div_(side)
        length = sums.shape[dim] - power
        sums = sums.narrow(dim, 0, length) + sums.narrow(dim, power, length)
        power *= 2


def _gaussian(side: int) -> list[float]:
    weights = [math.exp(-((k - side // 2) ** 2) / (2 * SIGMA**2)) for k in range(side)]
    return [weight / sum(weights) for weight in weights]


def _strips(shape: Sequence[int], device: torch.device) -> list[slice]:
    """Slices that cover the rows of (C,H,W), each with about as many pixels as a tile."""
    channels, height, width = shape
    return _spans(height, max(1, TILE.get(device.type, TILE["cpu"]) ** 2 // (channels * width)))


def _spans(size: int, most: int) -> list[slice]:
    """Slices of nearly equal length, at most ``most``, that cover ``size``."""
    step = math.ceil(size / math.ceil(size / most))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
