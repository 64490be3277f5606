"""Metrics beside PSNR and SSIM: colour and perceptual distances, and quality without ground truth.

All measure images as they would be saved, rounded to 8 bit. All but CIEDE2000 come from optional packages
(requirements-extras.txt, which names their licences), imported only when used.
"""

import contextlib
import importlib
import importlib.util
import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor

from utils import rounding
from utils.errors import UserError, nearest, quoted
from utils.evaluation import metrics

Figure = Callable[[Tensor, Tensor | None], float]  # of a dehazed and its clear image, (3,H,W) in [0,1]
STRIP = 2**18  # pixels that CIEDE2000 takes at a time: scikit-image makes dozens of float64 maps of them
MODULES = {"lpips": "lpips", "fade-python": "pyfade", "pyiqa": "pyiqa"}  # the Python modules of packages
WEIGHTS = {"lpips": "checkpoints", "pyiqa": "pyiqa"}  # the packages' folders of weights, in PyTorch's hub folder
_TORCHVISION = "https://download.pytorch.org/models"
_PYIQA = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"


@dataclass(frozen=True)
class Metric:
    """A metric and its source.

    ``package`` is the pip package that it needs, if any; ``weights`` the URL of the file that the package downloads at
    its first use; ``least`` the shortest side in pixels for which it is defined.
    """

    name: str
    title: str
    needs_clear: bool
    better: Literal["higher", "lower"]
    digits: int
    source: str
    package: str | None = None
    weights: str | None = None
    least: int = 1


_ALL = (
    Metric(
        "ciede2000",
        "CIEDE2000",
        needs_clear=True,
        better="lower",
        digits=2,
        source="mean colour difference: Sharma, Wu, Dalal, Color Research & Application 2005; scikit-image",
    ),
    Metric(
        "lpips",
        "LPIPS",
        needs_clear=True,
        better="lower",
        digits=4,
        source="Zhang, Isola, Efros, Shechtman, Wang, CVPR 2018; package lpips, AlexNet, version 0.1",
        package="lpips",
        weights=f"{_TORCHVISION}/alexnet-owt-7be5be79.pth",
        least=31,
    ),
    Metric(
        "fade",
        "FADE",
        needs_clear=False,
        better="lower",
        digits=3,
        source="density of fog: Choi, You, Bovik, TIP 2015; package fade-python",
        package="fade-python",
        least=16,
    ),
    Metric(
        "niqe",
        "NIQE",
        needs_clear=False,
        better="lower",
        digits=3,
        source="Mittal, Soundararajan, Bovik, SPL 2013; package pyiqa",
        package="pyiqa",
        weights=f"{_PYIQA}/niqe_modelparameters.mat",
        least=96,
    ),
    Metric(
        "brisque",
        "BRISQUE",
        needs_clear=False,
        better="lower",
        digits=2,
        source="Mittal, Moorthy, Bovik, TIP 2012; package pyiqa",
        package="pyiqa",
        weights=f"{_PYIQA}/brisque_svm_weights.pth",
        least=16,
    ),
    Metric(
        "musiq",
        "MUSIQ",
        needs_clear=False,
        better="higher",
        digits=2,
        source="Ke, Wang, Wang, Milanfar, Yang, ICCV 2021; package pyiqa, trained on KonIQ-10k",
        package="pyiqa",
        weights=f"{_PYIQA}/musiq_koniq_ckpt-e95806b9.pth",
        least=32,
    ),
)
METRICS = {each.name: each for each in _ALL}
_ONE_AT_A_TIME = threading.Lock()  # pyiqa sets cuDNN's global flags while it computes, and puts them back


def metric(name: str) -> Metric:
    """The metric of that name; raises `UserError` with the nearest name if there is none."""
    if name not in METRICS:
        raise UserError(f"there is no metric '{quoted(name)}'{nearest(name, METRICS)}")
    return METRICS[name]


def installed(name: str) -> bool:
    """Whether the package of this metric is installed; it is not imported."""
    package = metric(name).package
    return package is None or importlib.util.find_spec(MODULES[package]) is not None


def load(names: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Figure]:
    """Functions by name, each called as f(dehazed, clear) with float images (3,H,W) in [0,1] on any device.

    ``clear`` may be None where the metric does not need it. Networks compute on ``device``. A figure is nan if a side
    is shorter than the metric is defined for. Raises `UserError` for unknown names, for packages that are missing or
    broken, and for weights that cannot be fetched; the functions raise it for images that cannot be compared.
    """
    chosen = [metric(name) for name in dict.fromkeys(names)]
    missing = [each for each in chosen if not installed(each.name)]
    if missing:
        packages = " ".join(dict.fromkeys(each.package for each in missing))
        names = ", ".join(each.name for each in missing)
        raise UserError(f"the packages of {names} are not installed; pip install {packages}, or take {names} out")
    return {each.name: _figure(each, _build(each, torch.device(device))) for each in chosen}


def _figure(each: Metric, measure: Callable[..., float]) -> Figure:
    @torch.no_grad()
    def figure(dehazed: Tensor, clear: Tensor | None = None) -> float:
        if each.needs_clear and clear is None:
            raise UserError(f"{each.name} compares with a clear image, and there is none; take {each.name} out")
        images = [dehazed, clear] if each.needs_clear else [dehazed]
        metrics.check(images[0], images[-1])
        if min(dehazed.shape[1:]) < each.least:
            return math.nan
        return float(measure(*map(rounding.to_8bit, images)))

    return figure


def _build(each: Metric, device: torch.device) -> Callable[..., float]:
    """The metric as a function of images (H,W,3) uint8."""
    if each.package is None:
        return _ciede2000
    with _quiet():
        try:
            module = importlib.import_module(MODULES[each.package])
        except (ImportError, OSError) as error:  # OSError: a missing shared library
            raise UserError(
                f"{each.name}: its package cannot be imported ({error}); pip install {each.package}"
            ) from None
        try:
            return BUILDERS[each.package](each.name, module, device)
        except OSError as error:  # no network; the base class of urllib's errors
            folder = Path(torch.hub.get_dir()) / WEIGHTS[each.package]
            raise UserError(
                f"{each.name}: its weights are not here and cannot be fetched ({error}); "
                f"download {each.weights} elsewhere and put it into {folder}, or take {each.name} out"
            ) from None


def _ciede2000(dehazed: np.ndarray, clear: np.ndarray) -> float:
    height, width = dehazed.shape[:2]
    step = max(1, STRIP // width)
    total = 0.0
    for start in range(0, height, step):
        strips = (rgb2lab(image[start : start + step]) for image in (clear, dehazed))
        total += deltaE_ciede2000(*strips).sum()
    return total / (height * width)


def _lpips(name: str, module: ModuleType, device: torch.device) -> Callable[..., float]:
    network = module.LPIPS(net="alex", version="0.1", verbose=False).to(device).eval()
    return lambda dehazed, clear: network(*(_batch(image, device) * 2 - 1 for image in (dehazed, clear))).item()


def _fade(name: str, module: ModuleType, device: torch.device) -> Callable[..., float]:
    return module.fade


def _pyiqa(name: str, module: ModuleType, device: torch.device) -> Callable[..., float]:
    network = module.create_metric(name, device=device)

    def measure(dehazed: np.ndarray) -> float:
        with _ONE_AT_A_TIME:
            return network(_batch(dehazed, device)).item()

    return measure


BUILDERS = {"lpips": _lpips, "fade-python": _fade, "pyiqa": _pyiqa}


def _batch(image: np.ndarray, device: torch.device) -> Tensor:
    """(H,W,3) uint8 as (1,3,H,W) float in [0,1]."""
    return torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the output and warnings of packages are suppressed, except the progress bar of a download on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
