"""An imaging model of haze with several degradations.

KA-Net's paper (TPAMI 2024) trains on "a hazy imaging model with multiple degraded factors" whose formulas and code were
never released; `degrade` is this project's reconstruction from physics and the literature named below, and makes no
claim about theirs.
"""

import io
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.synthesis import add_haze, smooth_depth
from utils import config, physics
from utils.rounding import to_8bit


def degrade(
    clear: Tensor, depth: Tensor | None, rng: np.random.Generator, settings: config.Degradations
) -> dict[str, Tensor]:
    """Apply the imaging model to ``clear`` (3,H,W) in [0,1]; without ``depth`` (1,H,W) a depth map is generated.

    Illumination, airlight colour, haze, a second scattering, blur, noise and JPEG are applied in the order of the
    light's path through scene and camera, each with its own probability and ranges. All numbers are drawn, used or
    not, so that switching one degradation off does not change the others.
    -> hazy (3,H,W) in [0,1]; clear, unchanged, the target: illumination is a degradation that the network should
    undo, as in the overview of CGID (TCSVT 2024), by KA-Net's first author; transmission (1,H,W), the scene's share
    after both scatterings; airlight (3,1,1); density (1,), 0 without haze.
    """
    if depth is None:
        depth = smooth_depth(*clear.shape[1:], rng)
    grey = rng.uniform(*settings.airlight)
    illumination, colour, scattering, second, blurring, noise, jpeg = (
        _draw(getattr(settings, field.name), rng) for field in fields(settings) if field.name != "airlight"
    )
    scene = clear
    light = torch.full((3, 1, 1), grey)
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
    """Change the illumination of a scene: ``factor`` x^gamma, clamped to [0,1]; any shape, x in [0,1].

    As Lv et al. synthesise dark images, "Attention Guided Low-Light Image Enhancement" (IJCV 2021). It is also applied
    to the airlight, which is scattered light of the same source.
    """
    return (factor * x**gamma).clamp(0, 1)


def tint(light: Tensor, warmth: float, green: float) -> Tensor:
    """Colour an airlight (3,1,1) in [0,1] along a camera's two axes of white balance; (3,1,1) in [0,1].

    ``warmth`` in [-1,1] reduces blue (above 0: yellow and brown dust) or red (below 0: bluish haze), and green by 0.4
    of that; ``green`` in [-1,1] is added to green. The 0.4 was chosen by eye.
    """
    gain = torch.tensor([1 + min(warmth, 0), 1 - 0.4 * abs(warmth) + green, 1 - max(warmth, 0)], dtype=light.dtype)
    return (light * gain.view(3, 1, 1)).clamp(0, 1)


def scatter_again(hazy: Tensor, t: Tensor, light: Tensor, transmission: float) -> tuple[Tensor, Tensor]:
    """A second scattering, the same at every depth: I' = (A / max A) I t' + A (1 - t').

    ``hazy`` (3,H,W) with transmission ``t`` (1,H,W), ``light`` A (3,1,1), ``transmission`` t' in [0,1].
    -> hazy (3,H,W), t t' (1,H,W). After the overview of CGID (TCSVT 2024), by KA-Net's first author, which has
    A I t' + A (1 - t'): the light on near objects is scattered too, and yellow in dust. The division by the largest
    channel is this project's; with it, grey airlight does not darken the image, and t' = 1 then has no effect.
    """
    cast = light / light.amax().clamp(min=1e-6)
    return physics.scatter(cast * hazy, torch.tensor(transmission), light).clamp(0, 1), t * transmission


def blur(hazy: Tensor, t: Tensor, sigma: float) -> Tensor:
    """Forward scattering: I' = I t + (G * I) (1 - t), G a Gaussian of ``sigma`` > 0 pixels, edges replicated.

    Light scattered by a small angle arrives next to its pixel, more of it in denser haze: the glow of Narasimhan and
    Nayar, "Shedding Light on the Weather" (CVPR 2003), simplified to one Gaussian.
    ``hazy`` (3,H,W), ``t`` (1,H,W), both in [0,1] -> (3,H,W) in [0,1].
    """
    radius = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    blurred = F.pad(hazy[:, None], (radius,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(blurred, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]
    return torch.lerp(blurred, hazy, t).clamp(0, 1)


def add_noise(image: Tensor, rng: np.random.Generator, shot: float, read: float) -> Tensor:
    """Add shot and read noise, normal with variance shot^2 I + read^2, and clamp: (3,H,W) in [0,1] -> the same.

    ``shot``: standard deviation of the photon noise at white; ``read``: of the electronic noise, everywhere.
    Foi et al., "Practical Poissonian-Gaussian Noise Modeling and Fitting for Single-Image Raw-Data" (TIP 2008).
    """
    normal = torch.from_numpy(rng.standard_normal(image.shape, np.float32))
    return (image + (shot**2 * image + read**2).sqrt() * normal).clamp(0, 1)


def compress(image: Tensor, quality: float) -> Tensor:
    """Encode (3,H,W) in [0,1] as JPEG of ``quality`` 1 to 100, chroma at half resolution, and decode it."""
    file = io.BytesIO()
    Image.fromarray(to_8bit(image)).save(file, "JPEG", quality=round(quality))
    pixels = torch.from_numpy(np.array(Image.open(file)))
    return pixels.permute(2, 0, 1).contiguous().float().div_(255)


def _draw(degradation: Any, rng: np.random.Generator) -> dict[str, float] | None:
    """Every value of a degradation, uniform in its range; None if not applied. The number of draws is constant."""
    applied = rng.random() < degradation.probability
    ranges = {field.name: getattr(degradation, field.name) for field in fields(degradation)}
    values = {name: rng.uniform(*bounds) for name, bounds in ranges.items() if name != "probability"}
    return values if applied else None
