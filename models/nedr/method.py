"""NeDR's unpaired game (arXiv 2511.13110; adversarial training is D4's, CVPR 2022), and its supervised warm start."""

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from losses.adversarial import discriminator_loss, generator_loss
from losses.perceptual import PerceptualLoss
from losses.priors import dark_channel_energy, dark_channel_loss, total_variation
from models import encoder
from models.layers import single, still
from models.method import About, Loss, Method, frozen
from models.nedr import official
from models.nedr.discriminator import Discriminator
from models.nedr.generators import TRANSMISSION_RANGE, DepthNet, ProductionNet, Removal, RemovalNet
from models.nedr.settings import NeDRSettings, minimum_side
from models.nedr.watch import Watch
from models.nedr.working_size import seen_size
from models.pyramid import STRIDE, initialise
from utils import config, physics
from utils.checkpoint import load_strict
from utils.errors import UserError


class Cycles(NamedTuple):
    """Both cycles, hazy -> clear -> hazy and clear -> hazy -> clear, or no more of them than needed."""

    hazy: Tensor
    clear: Tensor
    found: Removal  # in hazy
    depth: Tensor | None = None  # by the depth network, of the clear image found
    rehazed: Tensor | None = None
    density: Tensor | None = None  # random, of the haze made on clear
    airlight: Tensor | None = None  # random too where it is learned; else production's own rule
    made: Tensor | None = None  # hazy, from clear
    refound: Removal | None = None  # in made


class NeDR(Method):
    """NeDR, and with its three modules off D4: removal, production and depth networks and two discriminators.

    ``networks`` names the children to make; an inference file needs ``removal`` alone.
    """

    about = About(
        "Neural Degradation Representation",
        "arXiv 2511.13110, 2025",
        "unpaired hazy and clear images; optionally a supervised warm start",
    )
    Settings = NeDRSettings
    multiple = STRIDE
    test_time = ("airlight", "guided_filter", "working_size", "query", "guided_radius")
    inference = ("removal",)
    averaged = ("removal", "production", "depth")
    replaceable = ("removal.airlight.",)
    stages: ClassVar[dict[str, str]] = {"warm_start": "synthetic", "train": "unpaired"}
    children_names = ("removal", "production", "depth", "discriminator_clear", "discriminator_hazy")

    def __init__(self, settings: NeDRSettings, networks: tuple[str, ...] = children_names):
        super().__init__(settings)
        s, features = settings, settings.base_channels // 2
        makers = {
            "removal": lambda: RemovalNet(
                features,
                s.density_range,
                s.kan_cid,
                s.idrm,
                s.drem,
                positional=s.variant == "published",
                airlight_head=s.airlight_head if s.airlight == "learned" else None,
                airlight_bounds=s.airlight_bounds,
                backbone=s.encoder,
                idrm_hidden=s.idrm_hidden,
                drem_growth=s.drem_growth,
                transmission_range=s.transmission_range,
            ),
            "production": lambda: ProductionNet(features),
            "depth": lambda: DepthNet(features, s.depth_range, s.encoder),
            "discriminator_clear": Discriminator,
            "discriminator_hazy": Discriminator,
        }
        for name in networks:
            self.add_module(name, makers[name]())
        self.to(memory_format=torch.channels_last)
        self.minimum = minimum_side(s)
        self.watch = Watch(s.block)
        self.ruler: list[PerceptualLoss] = []  # in a list: a loss is no part of the method's weights

    @classmethod
    def check(cls, settings: config.Settings) -> None:
        least = minimum_side(settings.method)
        for size in settings.data.crop_shape:
            if size % STRIDE or size < least:
                raise UserError(
                    f"data.crop_size={size}: {settings.model} needs a multiple of {STRIDE}, at least {least}"
                )

    def save_memory(self) -> None:
        self.removal.recompute = self.removal.pyramid.recompute = True  # the largest; depth is frozen at times

    @classmethod
    def recognises(cls, state: dict) -> bool:
        return official.recognise(state) == cls.Settings.block

    @classmethod
    def from_official(cls, state: dict, settings: NeDRSettings) -> "NeDR | None":
        """An official file of NeDR (or D4, as `D4`). ``settings`` gives what it does not say (ranges, airlight)."""
        if not cls.recognises(state):
            return None
        found = official.translate(state)
        released = {"variant": "released", "airlight": "max", "base_channels": 2 * found.features}
        for key, value in (released | {"encoder": encoder.RELEASED} | found.modules).items():
            setattr(settings, key, value)
        method = cls(settings, tuple(found.networks))
        if settings.drem and not found.has_drem:
            method.removal.drem.make_identity()
            warnings.warn(
                "the file holds no DREM weights (the released code never saves any): DREM is off", stacklevel=2
            )
            found.networks["removal"] |= {f"drem.{k}": v for k, v in method.removal.drem.state_dict().items()}
        for name, weights in found.networks.items():
            load_strict(getattr(method, name), weights, f"the official file's {name} network")
        method.skipped = found.skipped
        return method

    def to_official(self) -> dict[str, dict[str, Tensor]]:
        """The networks by their official names (``net_h2c``, ...), each a state dict that the released code loads.

        What it never reads is left out or useless there, with a warning: an airlight head is left out (its airlight is
        ``max`` or ``dark_channel``), and DREM, which it builds at random in every pass, stands as ``drem``, an entry
        of this project. The width and the ranges of density and depth are settings there too. Raises `UserError` for
        networks that are neither the released NeDR's nor D4's.
        """
        s = self.settings
        for key, value in self.released_sizes().items():
            if getattr(s, key) != value:
                raise UserError(
                    f"{s.block}.{key}={getattr(s, key)}: the released code has {value} alone; train with it to export"
                )
        if s.kan_cid != s.idrm or (s.drem and not s.idrm):
            told = ", ".join(f"{key}={getattr(s, key)}".lower() for key in ("kan_cid", "idrm", "drem"))
            raise UserError(
                f"{s.block}: {told}: the released code has NeDR, with KAN-CID and IDRM, and D4, with no module; train "
                f"one of these to export it"
            )
        if s.idrm and s.variant == "published":
            raise UserError(
                f"{s.block}.variant=published: its IDRM sees positions, where the released one has zeros; train with "
                f"{s.block}.variant=released to export"
            )
        networks = {name: network.state_dict() for name, network in self.named_children()}
        exported = official.export(networks, s.base_channels // 2)
        if self.removal.airlight is not None:
            warnings.warn("the airlight head is left out: the released code takes max or dark_channel", stacklevel=2)
        if "drem" in exported:
            warnings.warn("the released code never reads DREM's weights: it draws new ones in every pass", stacklevel=2)
        return exported

    def released_sizes(self) -> dict[str, Any]:
        """What is a setting here, of these modules, and no setting in the released code."""
        fixed = {"encoder": encoder.RELEASED, "transmission_range": TRANSMISSION_RANGE}
        fixed |= {"idrm_hidden": 256} if self.settings.idrm else {}
        return fixed | ({"drem_growth": 64} if self.settings.drem else {})

    def accept(self, settings: NeDRSettings) -> None:
        if settings.airlight == "learned" and self.removal.airlight is None:
            raise UserError(
                f"{self.settings.block}.airlight=learned: these weights have no airlight head; set max or dark_channel"
            )
        super().accept(settings)

    def preset(self, **released: Any) -> dict[str, Any]:
        """A learned airlight suits every set; without one, the released airlight and filter of each set apply."""
        return {} if self.removal.airlight is not None else released

    def guess(self, told: Collection[str]) -> str | None:
        """The airlight, where it is neither learned nor told: training takes max, tests of most sets dark_channel."""
        if self.removal.airlight is not None or "airlight" in told or self.settings.airlight != "max":
            return None
        block = self.settings.block
        return (
            f"nothing tells how {block} is to find the airlight, and a wrong guess costs many dB: it takes max, as its "
            f"authors do for SOTS-indoor; for all else they take {block}.airlight=dark_channel "
            f"{block}.guided_filter=true; give either to be rid of this line"
        )

    def start(self) -> None:
        """Weights as training begins: the released initialisation, then the encoders' own weights."""
        for network in (self.removal, self.production, self.depth):
            inner = network.pyramid.encoder if hasattr(network, "pyramid") else None
            kept = {k: v.clone() for k, v in inner.state_dict().items()} if inner else {}
            initialise(network)
            if inner:
                inner.load_state_dict(kept)
        s, encoders = self.settings, [network.pyramid.encoder for network in (self.removal, self.depth)]
        encoder.load(encoders, s.encoder, s.encoder_weights, f"{s.block}.encoder_weights")
        if self.settings.perceptual_weight:
            self._perceptual()  # what cannot be had is refused now

    def optimisers(self, stage: str, settings: config.Settings) -> dict[str, Optimizer]:
        s, warm = self.settings, settings.warm_start
        if stage == "warm_start":
            how = {"lr": warm.learning_rate, "weight_decay": warm.weight_decay, "fused": True}
            parts = {"generators": self.removal} | ({"depth": self.depth} if s.depth_weight else {})
            return {name: AdamW(_groups(network, s.encoder_rate, **how), **how) for name, network in parts.items()}
        parts = {"generators": ([self.removal, self.production], 1.0)}
        if s.depth_weight:
            parts["depth"] = ([self.depth], 1.0)
        if s.gan_weight:
            parts["discriminators"] = ([self.discriminator_clear, self.discriminator_hazy], s.discriminator_rate)
        return {
            name: Adam(
                [p for network in networks for p in network.parameters()],
                lr=share * s.learning_rate,
                betas=s.betas,
                fused=True,
            )
            for name, (networks, share) in parts.items()
        }

    def losses(self, batch: dict[str, Tensor], stage: str) -> Iterator[Loss]:
        return self._supervised(batch) if stage == "warm_start" else self._game(batch)

    def remarks(self, stage: str, step: int, figures: Mapping[str, float]) -> Iterator[str]:
        return self.watch.remarks(step, figures) if stage == "train" else iter(())

    def find(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        found = self.removal(hazy, self.settings.airlight, self.settings.guided_filter, tile)
        return {"clear": found.clear, "transmission": found.transmission, "airlight": found.airlight}

    def look(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        """As `Method.look`; with a working size the haze is found in a small image of the whole view.

        The field t is taken to the full size, where J = (I - A) / t + A is computed in pieces: what it costs beside
        that does not grow with the image.
        """
        if seen_size(*hazy.shape[2:], self.settings.working_size) is None:
            return super().look(hazy, tile)
        t, A, small = self._seen_small(hazy, tile)
        t = self.to_full_size(t, small, hazy)
        return {"clear": physics.restore_partly(hazy, t, A), "transmission": t, "airlight": A}

    def haze(self, hazy: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        if seen_size(*hazy.shape[2:], self.settings.working_size) is None:
            return super().haze(hazy, tile)
        return self._seen_small(hazy, tile)[:2]

    def fine(self, t: Tensor, hazy: Tensor) -> Tensor:
        if t.shape[2:] == hazy.shape[2:]:
            return t
        return self.to_full_size(t, F.interpolate(hazy, t.shape[2:], mode="bilinear", antialias=True), hazy)

    def _seen_small(self, hazy: Tensor, tile: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """t and A as found in the small image of the whole view, and that image."""
        s, size = self.settings, seen_size(*hazy.shape[2:], self.settings.working_size)
        small = F.interpolate(hazy, size, mode="bilinear", antialias=True).clamp(0, 1)
        found = self.removal.find(self.padded(small), s.airlight, tile, s.query)
        t = single(found.transmission)[..., : s.query * size[0], : s.query * size[1]]
        return t, single(found.airlight), small

    def to_full_size(self, t: Tensor, small: Tensor, hazy: Tensor) -> Tensor:
        """The field t of the small image, (N,1,H,W) of the large one; along its edges if settings have it."""
        s = self.settings
        if s.guided_radius:
            if t.shape[2:] != small.shape[2:]:
                small = F.interpolate(hazy, t.shape[2:], mode="bilinear", antialias=True)
            t = physics.fast_guided_filter(hazy, small, t, s.query * s.guided_radius)
        else:
            t = F.interpolate(t, hazy.shape[2:], mode="bilinear", align_corners=False)
            t = physics.guided_filter(hazy, t) if s.guided_filter else t
        return t.clamp(*s.transmission_range)

    # The supervised stage: haze made by the haze law, so everything is known.

    def _supervised(self, batch: dict[str, Tensor]) -> Iterator[Loss]:
        """L1 on t and J, MSE on beta, L1 on A where it is learned; the depth network learns its own target.

        J is restored with the true airlight: an error of the estimate, which a crop makes large, must not be pushed
        into t. Haze production needs no warm start: without training it is all but the scattering model.
        """
        hazy, clear, t = self._rescaled([batch[key] for key in ("hazy", "clear", "transmission")])
        s, airlight, beta = self.settings, batch["airlight"], batch["density"].view(-1, 1, 1, 1)
        found = self.removal.find(hazy, s.airlight)
        terms = {
            "transmission": F.l1_loss(found.transmission, t),
            "clear": F.l1_loss(physics.unbounded(hazy, found.transmission, airlight), clear),
            "density": F.mse_loss(found.density, beta),
        }
        total = terms["transmission"] + terms["clear"] + s.density_weight * terms["density"]
        if s.airlight == "learned":
            terms["airlight"] = F.l1_loss(found.airlight, airlight)
            total = total + terms["airlight"]
        if s.airlight == "learned" and s.found_airlight_weight:
            restored = physics.unbounded(hazy, found.transmission.detach(), found.airlight)
            terms["restored"] = F.l1_loss(restored, clear)
            total = total + s.found_airlight_weight * terms["restored"]
        yield Loss("generators", total, terms)
        if s.depth_weight:
            depth = (-t.log() / beta).clamp(*s.depth_range)
            yield Loss("depth", F.l1_loss(self.depth(clear), depth), {})

    def _rescaled(self, maps: list[Tensor]) -> list[Tensor]:
        """``maps`` at one of the scales, drawn anew in every step; sides are those that the networks can take."""
        scales = self.settings.scales
        scale = scales[int(torch.randint(len(scales), ()))] if len(scales) > 1 else scales[0]
        if scale == 1:
            return maps
        size = [max(self.minimum, round(side * scale / STRIDE) * STRIDE) for side in maps[0].shape[2:]]
        return [F.interpolate(each, size, mode="bilinear", antialias=True) for each in maps]

    # Adversarial training.

    def _game(self, batch: dict[str, Tensor]) -> Iterator[Loss]:
        s = self.settings
        if s.frozen_statistics:
            still(self.removal, self.depth)
        play = self._cycles(batch["hazy"], batch["clear"])
        again = {name.removeprefix("replay_"): each for name, each in batch.items() if name.startswith("replay_")}
        replayed = {loss.optimiser: loss for loss in self._supervised(again)} if again else {}
        if s.gan_weight:
            yield self._discriminators(play)
        if s.depth_weight:
            pseudo = F.l1_loss(play.depth, play.found.depth.detach())
            total = s.depth_weight * pseudo + (replayed["depth"].value if replayed else 0)
            yield Loss("depth", total, {"pseudo_depth": pseudo}, shared=True)
        weighted = self._generator_terms(play)
        total = sum(weight * term for weight, term in weighted.values())
        terms = {name: term for name, (_, term) in weighted.items()}
        if replayed:
            total = total + replayed["generators"].value
            terms |= {f"replay_{name}": term for name, term in replayed["generators"].terms.items()}
        t = play.found.transmission.flatten(1)
        yield Loss("generators", total, terms | {"t_mean": t.mean(), "t_deviation": t.std(1).mean()})

    def _cycles(self, hazy: Tensor, clear: Tensor) -> Cycles:
        """Both cycles. The depth of the clear image found serves the cycle and the depth network's own loss."""
        kind, learns = self.settings.airlight, bool(self.settings.depth_weight)
        found = self.removal(hazy, kind)
        if not self.settings.cycles:
            return Cycles(hazy, clear, found)
        with contextlib.nullcontext() if learns else frozen(self.depth):
            depth = self.depth(found.clear)
        rehazed = self.production(found.clear, depth, found.density, self._own(found))
        density, airlight = self._random_haze(clear)
        with torch.no_grad():
            of_clear = self.depth(clear)
        made = self.production(clear, of_clear, density, airlight)
        return Cycles(hazy, clear, found, depth, rehazed, density, airlight, made, self.removal(made, kind))

    def _discriminators(self, play: Cycles) -> Loss:
        """Spectral normalisation turns at each pass, so the order matters: real first."""
        kind, fake_clear, fake_hazy = self.settings.gan, play.found.clear.detach(), play.made.detach()
        terms = {
            "discriminator_clear": discriminator_loss(*self.discriminator_clear(play.clear, fake_clear), kind),
            "discriminator_hazy": discriminator_loss(*self.discriminator_hazy(play.hazy, fake_hazy), kind),
        }
        return Loss("discriminators", sum(terms.values()), terms)

    def _generator_terms(self, play: Cycles) -> dict[str, tuple[float, Tensor]]:
        """name -> (weight, loss); what has no weight is not computed."""
        s, terms = self.settings, {}
        hazy, clear, found, refound = play.hazy, play.clear, play.found, play.refound
        if s.gan_weight:
            with frozen(self.discriminator_clear, self.discriminator_hazy):
                scores = self.discriminator_clear(found.clear), self.discriminator_hazy(play.made)
            terms["gan"] = (s.gan_weight, sum(generator_loss(score, s.gan) for score in scores) / 2)
        if s.cycle_weight:
            terms["cycle_clear"] = (s.cycle_weight, F.l1_loss(refound.clear, clear))
            terms["cycle_hazy"] = (s.cycle_weight, F.l1_loss(play.rehazed, hazy))
        if s.density_weight:
            terms["density"] = (s.density_weight, F.mse_loss(refound.density, play.density))
        if s.airlight_weight and play.airlight is not None:
            terms["airlight"] = (s.airlight_weight, F.l1_loss(refound.airlight, play.airlight))
        if s.perceptual_weight:
            ruler = self._perceptual().to(hazy.device)
            terms["perceptual"] = (s.perceptual_weight, ruler(refound.clear, clear) + ruler(play.rehazed, hazy))
        if s.dark_channel_weight:
            terms["dark_channel"] = (s.dark_channel_weight, dark_channel_loss(found.clear))
        if s.tv_weight:
            terms["tv"] = (s.tv_weight, total_variation(found.clear))
        if s.identity_weight:
            terms["identity"] = (s.identity_weight, F.l1_loss(self.removal(clear, s.airlight).clear, clear))
        if s.dark_channel_energy_weight:
            energy = dark_channel_energy(found.transmission, hazy, found.airlight, **vars(s.dark_channel_energy))
            terms["dark_channel_energy"] = (s.dark_channel_energy_weight, energy)
        return terms

    def _perceptual(self) -> PerceptualLoss:
        """The perceptual loss, made when it is first needed: a resumed run does not `start`."""
        if not self.ruler:
            p = self.settings.perceptual
            self.ruler = [PerceptualLoss(p.network, p.layers, p.weights, f"{self.settings.block}.perceptual")]
        return self.ruler[0]

    def _own(self, found: Removal) -> Tensor | None:
        """The airlight with which haze is produced again: the learned one, else production's own rule (None)."""
        return found.airlight if self.settings.airlight == "learned" else None

    def _random_haze(self, clear: Tensor) -> tuple[Tensor, Tensor | None]:
        """Random density, one an image; with a learned airlight also that, grey, so that it is known."""
        n, s = len(clear), self.settings
        beta = clear.new_empty(n, 1, 1, 1).uniform_(*s.density_range)
        if s.airlight != "learned":
            return beta, None
        return beta, clear.new_empty(n, 1, 1, 1).uniform_(*s.airlight_range).expand(n, 3, 1, 1)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """hazy, dehazed, rehazed, clear, synthetic (hazy), transmission and depth (of the clear images)."""
        hazy, clear, s = batch["hazy"], batch["clear"], self.settings
        found = self.removal(hazy, s.airlight)
        depth = self.depth(clear)
        beta, airlight = self._random_haze(clear)
        return {
            "hazy": hazy,
            "dehazed": found.clear,
            "rehazed": self.production(found.clear, self.depth(found.clear), found.density, self._own(found)),
            "transmission": found.transmission,
            "clear": clear,
            "synthetic": self.production(clear, depth, beta, airlight),
            "depth": depth / depth.amax((1, 2, 3), keepdim=True),
        }


def _groups(network: torch.nn.Module, share: float, lr: float, **_) -> list[dict]:
    """The parameters of ``network`` for an optimiser: the encoder's with its share of the rate, then the others."""
    inner = {id(p) for p in network.pyramid.encoder.parameters()}
    parts = [[p for p in network.parameters() if (id(p) in inner) == within] for within in (True, False)]
    return [{"params": part, "lr": rate} for part, rate in zip(parts, (share * lr, lr), strict=True)]
