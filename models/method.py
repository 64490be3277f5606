"""Method: the interface of a dehazing method to train.py and test.py."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import program
from models.program import ImageLike
from utils import config, physics, tiling
from utils.errors import UserError


class Loss(NamedTuple):
    """One loss of a training step: the name of its optimiser, the scalar, and its terms by name.

    Only that optimiser's parameters get gradients. ``shared``: the next loss uses the same graph, so the graph is
    kept, and the optimiser steps after the next loss's backward pass.
    """

    optimiser: str
    value: Tensor
    terms: dict[str, Tensor]
    shared: bool = False


class About(NamedTuple):
    """What ``--list-models`` prints about a method besides its size."""

    title: str
    citation: str
    trained_on: str


class Method(nn.Module):
    """A dehazing method: its networks are named children of this module.

    A subclass defines `about`, `Settings` (its block of configs.yml), `restore` or `predict`, and, if it can be
    trained, `stages`, `optimisers`, `losses` and, unless it trains on pairs, `sample_images`. ``stage`` is
    ``warm_start`` (supervised, before all else) or ``train`` (the method's own training).
    """

    about: ClassVar[About]
    Settings: ClassVar[type]
    multiple: ClassVar[int] = 1  # sides must be multiples of this ...
    minimum: int = 1  # ... and at least this; `dehaze` pads to it
    test_time: ClassVar[tuple[str, ...]] = ()  # settings that may change after training
    inference: ClassVar[tuple[str, ...]] = ()  # the children that `dehaze` needs
    replaceable: ClassVar[tuple[str, ...]] = ()  # parts that an initial checkpoint may lack or have in another shape
    averaged: ClassVar[tuple[str, ...]] = ()  # the children whose weights are averaged (EMA)
    stages: ClassVar[dict[str, str]] = {}  # training stage -> type of its data (`data.datasets.training`)

    def __init__(self, settings: Any):
        super().__init__()
        self.settings = settings
        self.skipped: list[str] | None = None  # tensors of an official file that its authors' code never uses

    @classmethod
    def with_networks(cls, settings: Any, names: Collection[str]) -> "Method":
        """The method with only those of its networks that are among ``names``."""
        method = cls(settings)
        for name in [name for name, _ in method.named_children() if name not in names]:
            delattr(method, name)
        return method

    @classmethod
    def check(cls, settings: config.Settings) -> None:
        """Refuse settings that cannot work together, before anything is loaded. Raises `UserError`."""

    def accept(self, settings: Any) -> None:
        """Use settings changed after training. Raises `UserError` for settings that the networks do not support."""
        self.settings = settings

    def preset(self, **released: Any) -> dict[str, Any]:
        """The subset of ``released``, the authors' test settings for a benchmark, that applies to these weights."""
        return {}

    def guess(self, given: Collection[str]) -> str | None:
        """A warning about a guessed test-time setting of these weights; None if ``given`` names all that matter."""

    def save_memory(self) -> None:
        """Recompute activations in the backward pass from now on, where that is worth it (train.checkpointing)."""
        raise UserError(f"train.checkpointing=true: {type(self).__name__} cannot; set it to false")

    @classmethod
    def recognises(cls, state: dict) -> bool:
        """Do the names in ``state`` look like those of the authors' released file? Only a few names are checked."""
        return False

    @classmethod
    def from_official(cls, state: dict, settings: Any) -> "Method | None":
        """The method that the authors' released file holds, or None if it is not one of this method's.

        ``state`` has no wrappers (`utils.foreign.find`); ``settings`` supply what the file does not record. Raises
        `UserError` for an incomplete file of this method.
        """
        return None

    def to_official(self) -> dict[str, Any]:
        """The contents of a file that the authors' released code loads; tensors that it never uses are zeros.

        Raises `UserError` where the released networks cannot hold these weights.
        """
        raise UserError(f"{type(self).__name__} has no weights, and so nothing to export")

    def start(self) -> None:
        """Initialise the networks for training."""

    def optimisers(self, stage: str, settings: config.Settings) -> dict[str, Optimizer]:
        """The optimisers of a stage by name."""
        return {}

    def losses(self, batch: dict[str, Tensor], stage: str) -> Iterator[Loss]:
        """One training step's losses in order; the caller steps each loss's optimiser before asking for the next."""
        yield from ()

    def training_warnings(self, stage: str, step: int, figures: Mapping[str, float]) -> Iterator[str]:
        """Warnings about the course of a stage, from the ``figures`` (losses by name) logged at ``step``."""
        yield from ()

    def sample_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images for the log, (N,1 or 3,H,W) in [0,1], by name; this default suits methods that train on pairs."""
        with torch.no_grad():
            return {"hazy": batch["hazy"], "dehazed": self.restore(batch["hazy"]), "clear": batch["clear"]}

    def restore(self, hazy: Tensor) -> Tensor:
        """Clear images for hazy ones whose sides suit the networks. (N,3,H,W) -> same shape in [0,1].

        A new method needs only this to dehaze; one with further outputs or exact tiles overrides `predict` instead.
        """
        raise UserError(f"{type(self).__name__} cannot dehaze")

    def predict(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        """The method's outputs for hazy images (N,3,H,W) whose sides suit the networks.

        ``clear`` (N,3,H,W) in [0,1] and, if the method estimates them, ``transmission`` (N,1,H,W) and ``airlight``.
        With ``tile``, the side of tiles in pixels, memory must stay bounded. This default passes tiles through
        `restore` with a margin of a quarter of their side and cross-fades them, so global features are computed per
        tile; a method whose computation can be split exactly overrides this.
        """
        if tile is None:
            return {"clear": self.restore(hazy)}
        side = max(tile, 2 * self.minimum, 2 * self.multiple)
        options = {"halo": side // 4, "blend": side // 8, "down": self.multiple, "up": self.multiple}
        return {"clear": tiling.apply(lambda piece, _: self.restore(piece), hazy, tile=side, **options)}

    @property
    def exact_tiles(self) -> bool:
        """Do tiles give the same numbers as the whole image? True for a method that overrides `predict`."""
        return type(self).predict is not Method.predict

    def tile(self, hazy: Tensor, setting: int | str) -> int | None:
        """The side of the tiles for ``hazy`` (N,3,H,W) on its device, by ``setting``, a value of test.tile."""
        return tiling.choose(*hazy.shape[-2:], hazy.device, setting, self.exact_tiles)

    def inference_state(self) -> dict[str, Tensor]:
        """The weights that `dehaze` needs."""
        return {key: value for key, value in self.state_dict().items() if key.split(".")[0] in self.inference}

    def __call__(self, image: ImageLike) -> ImageLike:  # for type checkers: nn.Module's says Any
        return super().__call__(image)

    def forward(self, image: ImageLike) -> ImageLike:
        """The dehazed image, of the same type: a Pillow image, an array (H,W,3) or a tensor (3,H,W) or (N,3,H,W).

        Arrays and tensors hold uint8, or floats in [0,1], and keep their dtype; a Pillow image is returned as 8-bit
        RGB. Training does not use this. Raises TypeError or ValueError for anything else.
        """
        return self._output(image, "clear")

    def transmission(self, image: ImageLike) -> ImageLike:
        """The share of light, in [0,1], that reaches the camera through the haze, pixel by pixel; 1: no haze.

        A Pillow image gives a grey one (255: 1), an array floats (H,W), a tensor floats (1,H,W) or (N,1,H,W).
        Raises `UserError` if the method estimates none (AKNet and KA-Net), and otherwise as `forward`.
        """
        return self._output(image, "transmission")

    def _output(self, image: ImageLike, name: str) -> ImageLike:
        hazy, convert_back = program.to_tensor(image)
        weight = next(self.parameters(), None)
        hazy = hazy if weight is None else hazy.to(weight.device, weight.dtype)
        outputs = self.estimate(hazy, self.tile(hazy, "auto"))
        if name not in outputs:
            raise UserError(f"{type(self).__name__} finds no {name}; nedr, d4 and dcp do")
        return convert_back(outputs[name])

    def dehaze(self, hazy: Tensor, tile: int | None = None, ensemble: bool = False, strength: float = 1.0) -> Tensor:
        """Clear images for hazy ones of any size. (N,3,H,W) in [0,1] -> same shape in [0,1].

        ``tile`` computes in tiles of that many pixels a side, at least 128, to bound memory (see `tile`); None:
        the whole image at once. ``ensemble`` averages over the eight flips and quarter turns of the image
        (geometric self-ensemble; Lim et al., EDSR, CVPRW 2017), in eight times the time and the memory of one.
        ``strength`` as of `estimate`. Raises `UserError` for another shape and for smaller tiles.
        """
        if not ensemble:
            return self.estimate(hazy, tile, strength)["clear"]
        _check_shape(hazy)
        total = torch.zeros_like(hazy)
        for turns in range(4):
            for flips in ([], [3]):
                clear = self.estimate(hazy.rot90(turns, (2, 3)).flip(flips), tile, strength)["clear"]
                total += clear.flip(flips).rot90(-turns, (2, 3))
        return total / 8

    @torch.no_grad()
    def estimate(self, hazy: Tensor, tile: int | None = None, strength: float = 1.0) -> dict[str, Tensor]:
        """All outputs for hazy images (N,3,H,W) of any size, by name.

        ``clear`` (N,3,H,W) and, if the method estimates them, ``transmission`` (N,1,H,W) and ``airlight`` (N,3,1,1).
        Sides that do not suit the networks are padded by reflection, to the right and below, and all maps cropped
        again. ``strength``: how much of the haze is removed, J = (I - A) / t^strength + A; 0 returns ``hazy``. Raises
        `UserError` for a strength other than 1 if there is no transmission.
        """
        _check_shape(hazy)
        tiling.check(tile)
        outputs = self.predict_any_size(hazy, tile)
        if strength == 1:
            return outputs
        self.require_haze(outputs, f"test.strength={strength:g}")
        return outputs | {"clear": physics.restore_partly(hazy, outputs["transmission"], outputs["airlight"], strength)}

    @torch.no_grad()
    def estimate_haze(self, hazy: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """t (N,1,h,w), at the size at which it is estimated (`upsample_transmission` enlarges it), and A (N,3,1,1).

        Raises `UserError` for a method that estimates no haze.
        """
        outputs = self.predict_any_size(hazy, tile)
        self.require_haze(outputs, "test.temporal=true")
        return outputs["transmission"], outputs["airlight"]

    def upsample_transmission(self, t: Tensor, hazy: Tensor) -> Tensor:
        """t of `estimate_haze` at the size of ``hazy``, aligned with its edges if the settings ask for that."""
        return t

    def require_haze(self, outputs: dict[str, Tensor], setting: str) -> None:
        """Raise `UserError` for a ``setting`` that needs a transmission and an airlight if there are none."""
        if not {"transmission", "airlight"} <= outputs.keys():
            raise UserError(
                f"{setting}: {type(self).__name__} finds no transmission; leave it out, or take nedr, d4 or dcp"
            )

    def predict_any_size(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        """`predict` for images of any size: pads them for it and crops the outputs."""
        height, width = hazy.shape[-2:]
        return {name: each[..., :height, :width] for name, each in self.predict(self.padded(hazy), tile).items()}

    def padded(self, hazy: Tensor) -> Tensor:
        """``hazy`` with sides that suit the networks, padded by reflection to the right and below."""
        height, width = (-(-max(side, self.minimum) // self.multiple) * self.multiple for side in hazy.shape[-2:])
        return reflect(reflect(hazy, 2, height), 3, width)


def _check_shape(hazy: Tensor) -> None:
    if hazy.dim() != 4 or hazy.shape[1] != 3 or 0 in hazy.shape:
        raise UserError(f"dehaze needs images of shape (N,3,H,W), got {tuple(hazy.shape)}")


def reflect(x: Tensor, dim: int, size: int) -> Tensor:
    """``x`` padded to ``size`` along ``dim`` by reflection at its far end, back and forth as often as needed."""
    n = x.shape[dim]
    if n == size:
        return x
    period = max(1, 2 * (n - 1))
    index = torch.arange(size, device=x.device) % period
    return x.index_select(dim, torch.where(index < n, index, period - index))


@contextlib.contextmanager
def frozen(*modules: nn.Module):
    """Context in which these modules' parameters get no gradient; gradients still flow through the modules."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
