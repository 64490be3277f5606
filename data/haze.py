"""Haze on clear pictures: the law of RESIDE, and a model of imaging in haze with several degradations.

The law is the scattering model, I = J t + A (1 - t), t = exp(-beta d), in the manner of RESIDE's ITS (Li et al.,
"Benchmarking Single-Image Dehazing and Beyond", TIP 2019): d is the depth divided by the maximum of the whole map,
beta in [0.6, 1.8], A in [0.7, 1].

The model, `degrade`, is our own. KA-Net's paper (TPAMI 2024) trains on "a hazy imaging model with multiple degraded
factors" whose formulas and code were never released; this is a reconstruction from physics and the literature named
below, and no claim about theirs.

As a command (see `haze_set`) it writes a set: python -m data.haze --clear CLEAR --depth DEPTH --output OUTPUT
"""

import io
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.cache import Cache
from data.pixels import Pixels
from utils import config, errors, physics
from utils.errors import UserError
from utils.rounding import to_8bit

DENSITY = (0.6, 1.8)
AIRLIGHT = (0.7, 1.0)
LEAST_DEPTH = 0.03  # of `outdoor_depth`: nothing stands at the lens itself


def smooth_depth(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Make up a smooth depth map: a plane that recedes towards the top, with hills. (1,H,W), largest value 1."""
    ramp = torch.linspace(1, 0, height, dtype=torch.float64).view(1, height, 1) ** rng.uniform(0.7, 2.0)
    coarse = torch.from_numpy(rng.random((1, 1, 4, 5)))
    hills = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].clamp(0, 1)
    share = rng.uniform(0.5, 0.8)
    depth = share * ramp + (1 - share) * hills
    nearest = rng.uniform(0.05, 0.25)  # nothing stands at the lens itself
    depth = nearest + (1 - nearest) * depth
    return (depth / depth.max()).float()


def outdoor_depth(clear: Tensor, rng: np.random.Generator) -> Tensor:
    """Make up the depth of an outdoor picture (3,H,W) in [0,1] that has none: (1,H,W), largest value 1.

    A ground plane that recedes to a horizon, level or tilted, with all above it far away, times smooth noise; at times
    the noise alone. A guided filter lays it along the edges of the picture. Believable, not true: what it teaches is
    that far things have soft, even and bright haze, and near ones have none.
    """
    _, height, width = clear.shape
    rows = torch.linspace(0, 1, height).view(height, 1)
    rows = rows + rng.uniform(-0.25, 0.25) * torch.linspace(-0.5, 0.5, width)
    horizon, near = rng.uniform(0.1, 0.6), rng.uniform(0.03, 0.4)
    plane = (near / (rows - horizon).clamp(min=0).add(near))[None, None]  # 1 at the horizon and above it
    coarse = torch.from_numpy(rng.standard_normal((1, 1, int(rng.integers(3, 8)), int(rng.integers(3, 9)))))
    noise = F.interpolate(coarse.float(), (height, width), mode="bicubic", align_corners=False)
    strength, plain = rng.uniform(0, 0.7), rng.random() < 0.15
    depth = (1.5 * noise).sigmoid() if plain else plane * (strength * noise).exp()
    short = min(height, width) / 160  # the radii are those of pictures of this short side
    radius = max(1, round(short * rng.integers(6, 20)))
    depth = physics.guided_filter(clear[None], depth, radius, float(10 ** rng.uniform(-3.5, -2)))[0]
    return (depth / depth.max().clamp(min=1e-3)).clamp(LEAST_DEPTH, 1)


def add_haze(clear: Tensor, depth: Tensor, beta: float, airlight: Tensor) -> tuple[Tensor, Tensor]:
    """Put haze on ``clear`` (3,H,W) in [0,1], with ``depth`` (1,H,W), density ``beta`` >= 0, ``airlight`` of 3.

    -> hazy (3,H,W) in [0,1], transmission (1,H,W) in (0,1].
    """
    t = physics.transmission(depth, torch.tensor(beta, dtype=depth.dtype))
    return physics.scatter(clear, t, airlight.view(3, 1, 1)).clamp(0, 1), t


def random_haze(
    clear: Tensor, depth: Tensor | None, rng: np.random.Generator, law: config.Haze, made_up: str = ""
) -> dict[str, Tensor]:
    """Put haze of random density and airlight on ``clear`` (3,H,W), by ``law``.

    First the clear picture may change its exposure and its white balance, so that it is another clear picture. The
    airlight is a grey from its range, cut at 1; at times each channel of it is moved by up to ``law.colour``. At times
    it is dusk: ``law.light`` darkens the clear picture and the airlight alike, by a factor from its range.
    Without ``depth`` (1,H,W) that is made up as ``made_up`` has it (smooth | outdoor; by default ``law.depth``).
    -> hazy, clear (3,H,W), transmission (1,H,W), airlight (3,1,1), density (1,).
    """
    gamma, gains = _sometimes(law.gamma, rng), _sometimes(law.gains, rng, 3)
    if gamma is not None:
        clear = clear.clamp(min=1e-3) ** float(gamma[0])
    if gains is not None:
        clear = (clear * torch.from_numpy(gains.astype(np.float32)).view(3, 1, 1)).clamp(0, 1)
    if depth is None:
        outdoor = (made_up or law.depth) == "outdoor"
        depth = outdoor_depth(clear, rng) if outdoor else smooth_depth(*clear.shape[1:], rng)
    beta, grey = rng.uniform(*law.density), min(1.0, rng.uniform(*law.airlight))
    shift = rng.uniform(-1, 1, 3) * (law.colour if rng.random() < law.colour_probability else 0.0)
    light = torch.from_numpy(np.clip(grey + shift, 0, 1).astype(np.float32))
    if law.light.probability and (factor := _sometimes(law.light, rng)) is not None:
        clear, light = clear * float(factor[0]), light * float(factor[0])
    hazy, t = add_haze(clear, depth, beta, light)
    if law.noise:
        noise = torch.from_numpy(rng.random(hazy.shape, np.float32)) - 0.5
        hazy = (hazy + noise * (2 * law.noise / 255)).clamp(0, 1)
    return {
        "hazy": hazy,
        "clear": clear,
        "transmission": t,
        "airlight": light.view(3, 1, 1),
        "density": torch.tensor([beta], dtype=torch.float32),
    }


def degrade(
    clear: Tensor, depth: Tensor | None, rng: np.random.Generator, settings: config.Degradations
) -> dict[str, Tensor]:
    """Put ``clear`` (3,H,W) in [0,1] through the imaging model; without ``depth`` (1,H,W) that is made up too.

    Other light, airlight of another colour, haze, a second scattering, blur, noise and JPEG follow one another as in
    front of a camera and in it, each with its own probability and ranges. Every number is drawn, used or not, so
    that to switch one degradation off leaves the others as they were.
    -> hazy (3,H,W) in [0,1]; clear as it came, the target: the light is a degradation that the network shall undo,
    too, as in the overview of CGID (TCSVT 2024), by KA-Net's first author; transmission (1,H,W), the scene's share
    after both scatterings; airlight (3,1,1); density (1,), 0 where there is no haze.
    """
    if depth is None:
        depth = smooth_depth(*clear.shape[1:], rng)
    grey = rng.uniform(*settings.airlight)
    illumination, colour, scattering, second, blurring, noise, jpeg = (
        _draw(getattr(settings, field.name), rng) for field in fields(settings) if field.name != "airlight"
    )
    scene, light = clear, torch.full((3, 1, 1), grey)
    if colour:
        light = tint(light, **colour)
    if illumination:
        scene, light = (illuminate(x, **illumination) for x in (scene, light))
    beta = scattering["density"] if scattering else 0.0
    hazy, t = add_haze(scene, depth, beta, light)
    if second:
        hazy, t = scatter_again(hazy, t, light, **second)
    if blurring:
        hazy = blur(hazy, t, **blurring)
    if noise:
        hazy = add_noise(hazy, rng, **noise)
    if jpeg:
        hazy = compress(hazy, **jpeg)
    return {
        "hazy": hazy,
        "clear": clear,
        "transmission": t,
        "airlight": light,
        "density": torch.tensor([beta], dtype=torch.float32),
    }


def illuminate(x: Tensor, factor: float, gamma: float) -> Tensor:
    """Change the light on a scene: ``factor`` x^gamma, clamped to [0,1]; any shape, x in [0,1].

    So Lv et al. make dark pictures, "Attention Guided Low-Light Image Enhancement" (IJCV 2021). The airlight goes
    through it as well: it is scattered light of the same source.
    """
    return (factor * x**gamma).clamp(0, 1)


def tint(light: Tensor, warmth: float, green: float) -> Tensor:
    """Colour an airlight (3,1,1) in [0,1] along a camera's two axes of white balance; (3,1,1) in [0,1].

    ``warmth`` in [-1,1] takes blue away (above 0: yellow and brown dust) or red (below 0: bluish haze), and 0.4 of
    that from green; ``green`` in [-1,1] adds to green. The 0.4 is chosen by eye.
    """
    gain = torch.tensor([1 + min(warmth, 0), 1 - 0.4 * abs(warmth) + green, 1 - max(warmth, 0)], dtype=light.dtype)
    return (light * gain.view(3, 1, 1)).clamp(0, 1)


def scatter_again(hazy: Tensor, t: Tensor, light: Tensor, transmission: float) -> tuple[Tensor, Tensor]:
    """A second scattering, the same at every depth: I' = (A / max A) I t' + A (1 - t').

    ``hazy`` (3,H,W) with transmission ``t`` (1,H,W), ``light`` A (3,1,1), ``transmission`` t' in [0,1].
    -> hazy (3,H,W), t t' (1,H,W). After the overview of CGID (TCSVT 2024), by KA-Net's first author, which has
    A I t' + A (1 - t'): the light on near things, too, is scattered and yellow in dust. Dividing by the largest
    channel is ours; it leaves grey airlight's pass without darkening, and t' = 1 then without effect.
    """
    cast = light / light.amax().clamp(min=1e-6)
    return physics.scatter(cast * hazy, torch.tensor(transmission), light).clamp(0, 1), t * transmission


def blur(hazy: Tensor, t: Tensor, sigma: float) -> Tensor:
    """Forward scattering: I' = I t + (G * I) (1 - t), G a Gaussian of ``sigma`` > 0 pixels, edges repeated.

    Light that was scattered by a small angle arrives beside its place, the more of it the denser the haze: the glow
    of Narasimhan and Nayar, "Shedding Light on the Weather" (CVPR 2003), simplified to one Gaussian.
    ``hazy`` (3,H,W), ``t`` (1,H,W), both in [0,1] -> (3,H,W) in [0,1].
    """
    radius = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    soft = F.pad(hazy[:, None], (radius,) * 4, mode="replicate")
    soft = F.conv2d(F.conv2d(soft, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]
    return torch.lerp(soft, hazy, t).clamp(0, 1)


def add_noise(image: Tensor, rng: np.random.Generator, shot: float, read: float) -> Tensor:
    """Normal noise of variance shot^2 I + read^2, clamped: photons and electronics. (3,H,W) in [0,1] -> the same.

    ``shot``: the photons' standard deviation at white; ``read``: that of the electronics, everywhere.
    Foi et al., "Practical Poissonian-Gaussian Noise Modeling and Fitting for Single-Image Raw-Data" (TIP 2008).
    """
    normal = torch.from_numpy(rng.standard_normal(image.shape, np.float32))
    return (image + (shot**2 * image + read**2).sqrt() * normal).clamp(0, 1)


def compress(image: Tensor, quality: float) -> Tensor:
    """Write (3,H,W) in [0,1] as JPEG of ``quality``, 1 to 100, colour at half resolution, and read it again."""
    file = io.BytesIO()
    Image.fromarray(to_8bit(image)).save(file, "JPEG", quality=round(quality))
    pixels = torch.from_numpy(np.array(Image.open(file)))
    return pixels.permute(2, 0, 1).contiguous().float().div_(255)


def _sometimes(change: config.Sometimes, rng: np.random.Generator, count: int = 1) -> np.ndarray | None:
    """``count`` values uniform in the range, or None where it does not happen. Always as many draws."""
    happens, values = rng.random() < change.probability, rng.uniform(*change.range, count)
    return values if happens else None


def _draw(degradation: object, rng: np.random.Generator) -> dict[str, float] | None:
    """Every value of a degradation, uniform in its range; None where it does not happen. Always as many draws."""
    happens = rng.random() < degradation.probability
    ranges = {field.name: getattr(degradation, field.name) for field in fields(degradation)}
    values = {name: rng.uniform(*ends) for name, ends in ranges.items() if name != "probability"}
    return values if happens else None


def read_with_depth(clear: Path, depth: Path | None, cache: Cache | None = None) -> tuple[Pixels, Pixels | None]:
    """Read a picture (3,H,W) and its depth map (1,H,W). Raises `UserError` if their sizes differ."""
    cache = cache or Cache()
    picture = cache.picture(clear)
    if depth is None:
        return picture, None
    distance = cache.depth(depth)
    if distance.shape[1:] != picture.shape[1:]:
        sizes = [f"{pixels.shape[2]}x{pixels.shape[1]}" for pixels in (picture, distance)]
        raise UserError(f"{clear} is {sizes[0]} but its depth map {depth} is {sizes[1]}; they must have one size")
    return picture, distance


if __name__ == "__main__":
    from data import haze_set  # here, not above: it builds on this module

    errors.run(haze_set.main)
