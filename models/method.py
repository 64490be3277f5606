"""Method: what train.py and test.py need from any published system, and nothing more."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import program
from models.program import Picture
from utils import config, physics, tiling
from utils.errors import UserError


class Loss(NamedTuple):
    """One loss of a training step: which optimiser it moves, the scalar, and its parts by name.

    Gradients go to that optimiser's parameters alone. ``shared``: the next loss goes through the same computation, so
    that is kept, and the optimiser moves after the next loss's backward pass.
    """

    optimiser: str
    value: Tensor
    terms: dict[str, Tensor]
    shared: bool = False


class About(NamedTuple):
    """What ``--list-models`` tells of a method beside its size."""

    title: str
    citation: str
    trained_on: str


class Method(nn.Module):
    """A dehazing system: networks as named children and four verbs.

    A subclass gives `about`, `Settings` (its block of configs.yml), `restore` or `find`, and, unless it is free of
    training, `stages`, `optimisers`, `losses` and, where it does not train on pairs, `pictures`. ``stage`` is
    ``warm_start`` (supervised, before all else) or ``train`` (the method's own training).
    """

    about: ClassVar[About]
    Settings: ClassVar[type]
    multiple: ClassVar[int] = 1  # sides must be multiples of this ...
    minimum: int = 1  # ... and at least this; `dehaze` pads to it
    test_time: ClassVar[tuple[str, ...]] = ()  # settings that may change after training
    inference: ClassVar[tuple[str, ...]] = ()  # the children that `dehaze` needs
    replaceable: ClassVar[
        tuple[str, ...]
    ] = ()  # parts of the children that a file to begin with may lack or have other
    averaged: ClassVar[tuple[str, ...]] = ()  # the children whose weights are averaged (EMA)
    stages: ClassVar[dict[str, str]] = {}  # by what it can be trained -> on what (`data.datasets.training`)

    def __init__(self, settings: Any):
        super().__init__()
        self.settings = settings
        self.skipped: list[str] | None = None  # of an official file: the tensors that its authors' code never uses

    @classmethod
    def check(cls, settings: config.Settings) -> None:
        """Refuse settings that cannot work together, before anything is loaded. Raises `UserError`."""

    def accept(self, settings: Any) -> None:
        """Take settings changed after training. Raises `UserError` for what the networks cannot follow."""
        self.settings = settings

    def preset(self, **released: Any) -> dict[str, Any]:
        """Of the settings with which the released code tests a benchmark, those that these weights want."""
        return {}

    def guess(self, told: Collection[str]) -> str | None:
        """What is guessed of these weights' test-time settings, and how to say it, where ``told`` does not name it."""

    def save_memory(self) -> None:
        """From now on compute inner maps again in the backward pass, where that is worth it (train.checkpointing)."""
        raise UserError(f"train.checkpointing=true: {type(self).__name__} cannot; set it to false")

    @classmethod
    def recognises(cls, state: dict) -> bool:
        """Do the names in ``state`` look like those of the authors' released file? Told from a few of them."""
        return False

    @classmethod
    def from_official(cls, state: dict, settings: Any) -> "Method | None":
        """The method that the authors' released file holds, or None if it is not one of this method's.

        ``state`` is free of wrappers (`utils.foreign.find`); ``settings`` give what the file does not say. Raises
        `UserError` for a file of this method that is not whole.
        """
        return None

    def to_official(self) -> dict[str, Any]:
        """What a file holds that the authors' released code loads; tensors that it never uses are zeros.

        Raises `UserError` where the released networks cannot hold these weights.
        """
        raise UserError(f"{type(self).__name__} has no weights, and so nothing to export")

    def start(self) -> None:
        """Give the networks the weights with which training begins."""

    def optimisers(self, stage: str, settings: config.Settings) -> dict[str, Optimizer]:
        """The optimisers of a stage by name."""
        return {}

    def losses(self, batch: dict[str, Tensor], stage: str) -> Iterator[Loss]:
        """One training step's losses in order; the caller steps each loss's optimiser before asking for the next."""
        yield from ()

    def remarks(self, stage: str, step: int, figures: Mapping[str, float]) -> Iterator[str]:
        """What is to be said, once, of how a stage goes, from the ``figures`` (losses by name) logged at ``step``."""
        yield from ()

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images worth looking at, (N,1 or 3,H,W) in [0,1], by name; here those of a method that trains on pairs."""
        with torch.no_grad():
            return {"hazy": batch["hazy"], "dehazed": self.restore(batch["hazy"]), "clear": batch["clear"]}

    def restore(self, hazy: Tensor) -> Tensor:
        """Clear images for hazy ones whose sides suit the networks. (N,3,H,W) -> same shape in [0,1].

        All that a new method needs in order to dehaze; one with more to show or with tiles of its own gives `find`.
        """
        raise UserError(f"{type(self).__name__} cannot dehaze")

    def find(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        """What the method finds in hazy images (N,3,H,W) whose sides suit the networks.

        ``clear`` (N,3,H,W) in [0,1] and, where the method has them, ``transmission`` (N,1,H,W) and ``airlight``.
        With ``tile``, the side of tiles in pixels, memory must stay bounded. Here tiles are taken through `restore`
        with a quarter of their side around them and cross-faded, so that what the networks take from the whole image
        is a tile's own; a method whose computation can be taken apart overrides this with tiles that give the numbers
        of the whole.
        """
        if tile is None:
            return {"clear": self.restore(hazy)}
        side, step = max(tile, 2 * self.minimum, 2 * self.multiple), self.multiple
        around = {"halo": side // 4, "blend": side // 8, "down": step, "up": step}
        return {"clear": tiling.apply(lambda piece, _: self.restore(piece), hazy, tile=side, **around)}

    @property
    def exact_tiles(self) -> bool:
        """Do tiles give the numbers of the whole? Those of a `find` of a method's own do; cross-faded ones do not."""
        return type(self).find is not Method.find

    def tile(self, hazy: Tensor, setting: int | str) -> int | None:
        """The side of the tiles for ``hazy`` (N,3,H,W) where it lies, as the setting test.tile has it."""
        return tiling.choose(*hazy.shape[-2:], hazy.device, setting, self.exact_tiles)

    def inference_state(self) -> dict[str, Tensor]:
        """The weights that `dehaze` needs."""
        return {key: value for key, value in self.state_dict().items() if key.split(".")[0] in self.inference}

    def __call__(self, image: Picture) -> Picture:  # for type checkers: nn.Module's says Any
        return super().__call__(image)

    def forward(self, image: Picture) -> Picture:
        """``image`` without haze, as it was given: a Pillow image, an array (H,W,3) or a tensor (3,H,W) or (N,3,H,W).

        Arrays and tensors hold uint8, or floats in [0,1], and keep their type; a Pillow image comes back as RGB of 8
        bit. Training does not pass here. Raises TypeError or ValueError for anything else.
        """
        return self._answer(image, "clear")

    def transmission(self, image: Picture) -> Picture:
        """The share of light, in [0,1], that reaches the camera through the haze, pixel by pixel; 1: no haze.

        Of a Pillow image as one in grey (255: 1), of an array (H,W), of a tensor (1,H,W) or (N,1,H,W), floats both.
        Raises `UserError` if the method finds none, as AKNet and KA-Net, else what `forward` raises.
        """
        return self._answer(image, "transmission")

    def _answer(self, image: Picture, name: str) -> Picture:
        hazy, back = program.opened(image)
        weight = next(self.parameters(), None)
        hazy = hazy if weight is None else hazy.to(weight.device, weight.dtype)
        found = self.estimate(hazy, self.tile(hazy, "auto"))
        if name not in found:
            raise UserError(f"{type(self).__name__} finds no {name}; nedr, d4 and dcp do")
        return back(found[name])

    def dehaze(self, hazy: Tensor, tile: int | None = None, ensemble: bool = False, strength: float = 1.0) -> Tensor:
        """Clear images for hazy ones of any size. (N,3,H,W) in [0,1] -> same shape in [0,1].

        ``tile`` computes in tiles of that many pixels a side, at least 128, to bound memory (see `tile`); None:
        the whole image at once. ``ensemble`` averages over the eight flips and quarter turns of the image
        (geometric self-ensemble; Lim et al., EDSR, CVPRW 2017), in eight times the time and the memory of one.
        ``strength`` as of `estimate`. Raises `UserError` for another shape and for smaller tiles.
        """
        if not ensemble:
            return self.estimate(hazy, tile, strength)["clear"]
        _check(hazy)
        total = torch.zeros_like(hazy)
        for turns in range(4):
            for flips in ([], [3]):
                clear = self.estimate(hazy.rot90(turns, (2, 3)).flip(flips), tile, strength)["clear"]
                total += clear.flip(flips).rot90(-turns, (2, 3))
        return total / 8

    @torch.no_grad()
    def estimate(self, hazy: Tensor, tile: int | None = None, strength: float = 1.0) -> dict[str, Tensor]:
        """The clear images as of `dehaze`, and what else the method finds in hazy ones (N,3,H,W), by name.

        ``clear`` (N,3,H,W) and, where the method has them, ``transmission`` (N,1,H,W) and ``airlight`` (N,3,1,1). Sides
        that do not suit the networks are padded by reflection, to the right and below, and all maps cropped again.
        ``strength``: how much of the haze is taken away, J = (I - A) / t^strength + A; 0 gives ``hazy`` back. Raises
        `UserError` for another one than 1 where there is no transmission.
        """
        _check(hazy)
        tiling.check(tile)
        found = self.look(hazy, tile)
        if strength == 1:
            return found
        self.check_haze(found, f"test.strength={strength:g}")
        return found | {"clear": physics.restore_partly(hazy, found["transmission"], found["airlight"], strength)}

    @torch.no_grad()
    def haze(self, hazy: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """The haze alone: t (N,1,h,w), of the size at which it is found, and A (N,3,1,1). `fine` takes t to full size.

        Raises `UserError` for a method that finds none.
        """
        found = self.look(hazy, tile)
        self.check_haze(found, "test.temporal=true")
        return found["transmission"], found["airlight"]

    def fine(self, t: Tensor, hazy: Tensor) -> Tensor:
        """t of `haze` at the size of ``hazy``, along its edges if the settings have it."""
        return t

    def check_haze(self, found: dict[str, Tensor], wanted_by: str) -> None:
        """Refuse what takes a transmission and an airlight where this method finds none. Raises `UserError`."""
        if not {"transmission", "airlight"} <= found.keys():
            raise UserError(
                f"{wanted_by}: {type(self).__name__} finds no transmission; leave it out, or take nedr, d4 or dcp"
            )

    def look(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        """What `find` gives for images of any size: padded for it, and cropped again."""
        height, width = hazy.shape[-2:]
        return {name: found[..., :height, :width] for name, found in self.find(self.padded(hazy), tile).items()}

    def padded(self, hazy: Tensor) -> Tensor:
        """``hazy`` with sides that suit the networks, grown by reflection to the right and below."""
        height, width = (-(-max(side, self.minimum) // self.multiple) * self.multiple for side in hazy.shape[-2:])
        return reflect(reflect(hazy, 2, height), 3, width)


def _check(hazy: Tensor) -> None:
    if hazy.dim() != 4 or hazy.shape[1] != 3 or 0 in hazy.shape:
        raise UserError(f"dehaze needs images of shape (N,3,H,W), got {tuple(hazy.shape)}")


def reflect(x: Tensor, dim: int, size: int) -> Tensor:
    """``x`` grown to ``size`` along ``dim`` by reflection at its far end, back and forth as often as needed."""
    n = x.shape[dim]
    if n == size:
        return x
    period = max(1, 2 * (n - 1))
    index = torch.arange(size, device=x.device) % period
    return x.index_select(dim, torch.where(index < n, index, period - index))


@contextlib.contextmanager
def frozen(*modules: nn.Module):
    """No gradient for these modules' parameters from what is computed inside; gradients still flow through."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
