"""NeDR (arXiv 2511.13110): unpaired adversarial training, as in D4 (CVPR 2022), and a supervised warm start."""

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
from models.layers import freeze_batch_norm, single, untracked_batch_norm
from models.method import About, Loss, Method, frozen
from models.nedr import official
from models.nedr.discriminator import Discriminator
from models.nedr.generators import TRANSMISSION_RANGE, DepthNet, ProductionNet, Removal, RemovalNet
from models.nedr.settings import NeDRSettings, minimum_side
from models.nedr.watch import Watch
from models.nedr.working_size import network_size
from models.pyramid import STRIDE, initialise
from utils import config, physics
from utils.checkpoint import load_strict
from utils.errors import UserError


class Cycles(NamedTuple):
    """Both cycles, hazy -> clear -> hazy and clear -> hazy -> clear; None for what no loss needs."""

    hazy: Tensor
    clear: Tensor
    removal: Removal  # of hazy
    depth: Tensor | None = None  # of the dehazed image, by the depth network
    rehazed: Tensor | None = None
    density: Tensor | None = None  # random, for the synthetic haze on clear
    airlight: Tensor | None = None  # random too if it is learned; else None, the production network's default
    synthetic: Tensor | None = None  # hazy, made from clear
    synthetic_removal: Removal | None = None  # of synthetic


class NeDR(Method):
    """NeDR, or D4 with the three modules off: removal, production and depth networks and two discriminators.

    ``networks`` names the children to create; an inference file needs ``removal`` alone.
    """

    about = About(
        "Neural Degradation Representation",
        "arXiv 2511.13110, 2025",
        "unpaired hazy and clear images; optionally a supervised warm start",
    )
    Settings = NeDRSettings
    multiple = STRIDE
    test_time = ("airlight", "guided_filter", "balance", "working_size", "query", "guided_radius")
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
        self.perceptual_loss: list[PerceptualLoss] = []  # in a list, so that its weights are not the method's

    @classmethod
    def with_networks(cls, settings: NeDRSettings, names: Collection[str]) -> "NeDR":
        return cls(settings, tuple(name for name in cls.children_names if name in names))

    @classmethod
    def check(cls, settings: config.Settings) -> None:
        least = minimum_side(settings.method)
        for size in settings.data.crop_shape:
            if size % STRIDE or size < least:
                raise UserError(
                    f"data.crop_size={size}: {settings.model} needs a multiple of {STRIDE}, at least {least}"
                )
        trained, block = settings.method.trained, settings.method.block
        if settings.train.steps and not settings.method.trains_generators and not settings.warm_start.replay:
            raise UserError(
                f"{block}.cycle_weight=0: the generators need a loss; give gan, cycle, density, identity or "
                f"dark_channel_energy a weight, or set warm_start.replay=true"
            )
        if trained != "all" and settings.warm_start.steps and not settings.train.init:
            raise UserError(f"{block}.trained={trained}: name the trained weights to go on from as train.init=FILE")
        if settings.method.balance != "none" and settings.train.steps:
            raise UserError(
                f"{block}.balance=image: not in adversarial training; set train.steps=0, or the balance in tests"
            )
        if trained == "airlight" and settings.method.airlight != "learned":
            raise UserError(f"{block}.trained=airlight: there is no airlight head; set {block}.airlight=learned")

    def save_memory(self) -> None:
        self.removal.recompute = True  # the network with the largest maps; the depth network is frozen at times
        self.removal.pyramid.recompute = True

    @classmethod
    def recognises(cls, state: dict) -> bool:
        return official.recognise(state) == cls.Settings.block

    @classmethod
    def from_official(cls, state: dict, settings: NeDRSettings) -> "NeDR | None":
        """An official file of NeDR (or D4, as `D4`); ``settings`` supplies its unrecorded ranges and airlight."""
        if not cls.recognises(state):
            return None
        contents = official.translate(state)
        released = {"variant": "released", "airlight": "max", "base_channels": 2 * contents.features}
        for key, value in (released | {"encoder": encoder.RELEASED} | contents.modules).items():
            setattr(settings, key, value)
        method = cls(settings, tuple(contents.networks))
        if settings.drem and not contents.has_drem:
            method.removal.drem.make_identity()
            warnings.warn(
                "the file holds no DREM weights (the released code never saves any): DREM is off", stacklevel=2
            )
            contents.networks["removal"] |= {f"drem.{k}": v for k, v in method.removal.drem.state_dict().items()}
        for name, weights in contents.networks.items():
            load_strict(getattr(method, name), weights, f"the official file's {name} network")
        method.skipped = contents.skipped
        return method

    def to_official(self) -> dict[str, dict[str, Tensor]]:
        """The networks by their official names (``net_h2c``, ...), each a state dict that the released code loads.

        What that code never reads causes a warning: an airlight head is left out (the code uses ``max`` or
        ``dark_channel``), and DREM, which it builds at random in every pass, is stored as ``drem``, an entry of this
        project. The width and the ranges of density and depth are settings there too. Raises `UserError` for networks
        that are neither the released NeDR's nor D4's.
        """
        s = self.settings
        for key, value in self.released_sizes().items():
            if getattr(s, key) != value:
                raise UserError(
                    f"{s.block}.{key}={getattr(s, key)}: the released code has {value} alone; train with it to export"
                )
        if s.kan_cid != s.idrm or (s.drem and not s.idrm):
            modules = ", ".join(f"{key}={getattr(s, key)}".lower() for key in ("kan_cid", "idrm", "drem"))
            raise UserError(
                f"{s.block}: {modules}: the released code has NeDR, with KAN-CID and IDRM, and D4, with no module; "
                f"train one of these to export it"
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
        """The values that the released code fixes for these modules and that are settings here."""
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

    def guess(self, given: Collection[str]) -> str | None:
        """The airlight, if neither learned nor given: training uses max, tests on most benchmarks dark_channel."""
        if self.removal.airlight is not None or "airlight" in given or self.settings.airlight != "max":
            return None
        block = self.settings.block
        return (
            f"{block}.airlight is not given, and a wrong choice costs many dB: max is used, as the authors do for "
            f"SOTS-indoor; for all other sets they use {block}.airlight=dark_channel {block}.guided_filter=true; set "
            f"{block}.airlight to silence this warning"
        )

    def start(self) -> None:
        """The released initialisation; the encoders get their pretrained weights."""
        for network in (self.removal, self.production, self.depth):
            backbone = network.pyramid.encoder if hasattr(network, "pyramid") else None
            kept = {k: v.clone() for k, v in backbone.state_dict().items()} if backbone else {}
            initialise(network)
            if backbone:
                backbone.load_state_dict(kept)
        s = self.settings
        encoders = [network.pyramid.encoder for network in (self.removal, self.depth)]
        encoder.load(encoders, s.encoder, s.encoder_weights, f"{s.block}.encoder_weights")
        if s.perceptual_weight:
            self._get_perceptual_loss()  # fails now, not in the first step, if its weights are unavailable

    def optimisers(self, stage: str, settings: config.Settings) -> dict[str, Optimizer]:
        s, warm = self.settings, settings.warm_start
        if stage == "warm_start":
            options = {"lr": warm.learning_rate, "weight_decay": warm.weight_decay, "fused": True}
            parts = {"generators": self.removal.airlight if s.trained == "airlight" else self.removal}
            parts |= {"depth": self.depth} if s.depth_weight and s.trained != "airlight" else {}
            groups = {name: _parameter_groups(part, s.encoder_rate, options["lr"]) for name, part in parts.items()}
            return {name: AdamW(group, **options) for name, group in groups.items()}
        parts = {"generators": ([self.removal, self.production], 1.0)}
        if s.depth_weight:
            parts["depth"] = ([self.depth], 1.0)
        if s.gan_weight:
            parts["discriminators"] = ([self.discriminator_clear, self.discriminator_hazy], s.discriminator_rate)
        return {
            name: Adam(
                [p for network in networks for p in network.parameters()],
                lr=factor * s.learning_rate,
                betas=s.betas,
                fused=True,
            )
            for name, (networks, factor) in parts.items()
        }

    def losses(self, batch: dict[str, Tensor], stage: str) -> Iterator[Loss]:
        return self._supervised(batch, self.settings.trained) if stage == "warm_start" else self._adversarial(batch)

    def training_warnings(self, stage: str, step: int, figures: Mapping[str, float]) -> Iterator[str]:
        return self.watch.warnings(step, figures) if stage == "train" else iter(())

    def predict(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        if self.settings.balance == "none":
            return self._predict(hazy, tile)
        colour = self._colour(hazy)
        found = self._predict((hazy / colour).clamp(0, 1), tile)
        A = found["airlight"] * colour
        return found | {"clear": physics.restore_partly(hazy, found["transmission"], A), "airlight": A}

    def _predict(self, hazy: Tensor, tile: int | None) -> dict[str, Tensor]:
        removal = self.removal(hazy, self.settings.airlight, self.settings.guided_filter, tile)
        return {"clear": removal.clear, "transmission": removal.transmission, "airlight": removal.airlight}

    def _colour(self, hazy: Tensor) -> Tensor | int:
        """What the images are divided by before their haze is estimated, (N,3,1,1): I/c = (J/c) t + (A/c) (1-t)."""
        return physics.bright_colour(hazy) if self.settings.balance == "image" else 1

    def predict_any_size(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        """As `Method.predict_any_size`; with a working size the haze is estimated in a reduced image of the whole view.

        t is upsampled to the full size, where J = (I - A) / t + A is computed in pieces: all other cost is independent
        of the image's size.
        """
        if network_size(*hazy.shape[2:], self.settings.working_size) is None:
            return super().predict_any_size(hazy, tile)
        t, A, small = self._estimate_reduced(hazy, tile)
        t = self.to_full_size(t, small, hazy)
        return {"clear": physics.restore_partly(hazy, t, A), "transmission": t, "airlight": A}

    def estimate_haze(self, hazy: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        if network_size(*hazy.shape[2:], self.settings.working_size) is None:
            return super().estimate_haze(hazy, tile)
        return self._estimate_reduced(hazy, tile)[:2]

    def upsample_transmission(self, t: Tensor, hazy: Tensor) -> Tensor:
        if t.shape[2:] == hazy.shape[2:]:
            return t
        return self.to_full_size(t, F.interpolate(hazy, t.shape[2:], mode="bilinear", antialias=True), hazy)

    def _estimate_reduced(self, hazy: Tensor, tile: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """t and A as estimated in the reduced image of the whole view, and that image."""
        s, size = self.settings, network_size(*hazy.shape[2:], self.settings.working_size)
        small = F.interpolate(hazy, size, mode="bilinear", antialias=True).clamp(0, 1)
        colour = self._colour(small)
        balanced = (small / colour).clamp(0, 1)
        haze = self.removal.estimate_haze(self.padded(balanced), s.airlight, tile, s.query)
        t = single(haze.transmission)[..., : s.query * size[0], : s.query * size[1]]
        return t, single(haze.airlight) * colour, small

    def to_full_size(self, t: Tensor, small: Tensor, hazy: Tensor) -> Tensor:
        """t of the ``small`` image at the size of ``hazy``, (N,1,H,W); along its edges if the settings ask for that."""
        s = self.settings
        if s.guided_radius:
            if t.shape[2:] != small.shape[2:]:
                small = F.interpolate(hazy, t.shape[2:], mode="bilinear", antialias=True)
            t = physics.fast_guided_filter(hazy, small, t, s.query * s.guided_radius)
        else:
            t = F.interpolate(t, hazy.shape[2:], mode="bilinear", align_corners=False)
            t = physics.guided_filter(hazy, t) if s.guided_filter else t
        return t.clamp(*s.transmission_range)

    # The supervised stage: synthetic haze, so that all targets are known.

    def _supervised(self, batch: dict[str, Tensor], trained: str = "all") -> Iterator[Loss]:
        """L1 on t and J, MSE on beta, L1 on A if it is learned; the depth network has a target of its own.

        ``trained`` is the setting of that name; replay in adversarial training trains everything.

        J is restored with the true airlight: an error of the estimate, which is large in crops, must not be
        compensated by t. The production network needs no warm start: untrained, it nearly is the scattering model.
        """
        hazy, clear, t = self._rescaled([batch[key] for key in ("hazy", "clear", "transmission")])
        colour = self._colour(hazy)
        hazy, clear, airlight = hazy / colour, clear / colour, batch["airlight"] / colour
        s, beta = self.settings, batch["density"].view(-1, 1, 1, 1)
        with self._partly_frozen(trained):
            haze = self.removal.estimate_haze(hazy, s.airlight)
        terms = {
            "transmission": F.l1_loss(haze.transmission, t),
            "clear": F.l1_loss(physics.unbounded(hazy, haze.transmission, airlight), clear),
            "density": F.mse_loss(haze.density, beta),
        }
        total = terms["transmission"] + terms["clear"] + s.density_weight * terms["density"]
        if s.airlight == "learned":
            terms["airlight"] = F.l1_loss(haze.airlight, airlight)
            total = total + terms["airlight"]
        if s.airlight == "learned" and s.found_airlight_weight:
            restored = physics.unbounded(hazy, haze.transmission.detach(), haze.airlight)
            terms["restored"] = F.l1_loss(restored, clear)
            total = total + s.found_airlight_weight * terms["restored"]
        if s.airlight == "learned" and s.psnr_weight:
            error = (physics.unbounded(hazy, haze.transmission, haze.airlight) - clear).square().mean((1, 2, 3))
            terms["psnr"] = -10 * (error + 1e-4).log10().mean()  # images beyond 40 dB do not count
            total = total - s.psnr_weight * terms["psnr"]
        yield Loss("generators", total, terms)
        if s.depth_weight and trained != "airlight":
            depth = (-t.log() / beta).clamp(*s.depth_range)
            yield Loss("depth", F.l1_loss(self.depth(clear), depth), {})

    @contextlib.contextmanager
    def _partly_frozen(self, trained: str) -> Iterator[None]:
        """Context in which only what ``trained`` names is trained in the removal network."""
        fixed = [network for name, network in self.removal.named_children() if name != "airlight"]
        if trained != "all":
            freeze_batch_norm(*fixed)
        with frozen(*(fixed if trained == "airlight" else ())):
            yield

    def _rescaled(self, maps: list[Tensor]) -> list[Tensor]:
        """``maps`` at one of the scales, drawn at random in every step; the sides suit the networks."""
        scales = self.settings.scales
        scale = scales[int(torch.randint(len(scales), ()))] if len(scales) > 1 else scales[0]
        if scale == 1:
            return maps
        size = [max(self.minimum, round(side * scale / STRIDE) * STRIDE) for side in maps[0].shape[2:]]
        return [F.interpolate(each, size, mode="bilinear", antialias=True) for each in maps]

    # Adversarial training.

    def _adversarial(self, batch: dict[str, Tensor]) -> Iterator[Loss]:
        s = self.settings
        if s.frozen_statistics:
            freeze_batch_norm(self.removal, self.depth)
        cycles = self._cycles(batch["hazy"], batch["clear"])
        replay = {name.removeprefix("replay_"): each for name, each in batch.items() if name.startswith("replay_")}
        replayed = {loss.optimiser: loss for loss in self._supervised(replay)} if replay else {}
        if s.gan_weight:
            yield self._discriminator_loss(cycles)
        if s.depth_weight:
            pseudo = F.l1_loss(cycles.depth, cycles.removal.depth.detach())
            total = s.depth_weight * pseudo + (replayed["depth"].value if replayed else 0)
            yield Loss("depth", total, {"pseudo_depth": pseudo}, shared=True)
        weighted = self._generator_terms(cycles)
        total = sum(weight * term for weight, term in weighted.values())
        terms = {name: term for name, (_, term) in weighted.items()}
        if replayed:
            total = total + replayed["generators"].value
            terms |= {f"replay_{name}": term for name, term in replayed["generators"].terms.items()}
        t = cycles.removal.transmission.flatten(1)
        yield Loss("generators", total, terms | {"t_mean": t.mean(), "t_deviation": t.std(1).mean()})

    def _cycles(self, hazy: Tensor, clear: Tensor) -> Cycles:
        """Both cycles. The depth of the dehazed image serves the cycle and the depth network's loss."""
        kind = self.settings.airlight
        removal = self.removal(hazy, kind)
        if not self.settings.cycles:
            return Cycles(hazy, clear, removal)
        with contextlib.nullcontext() if self.settings.depth_weight else frozen(self.depth):
            depth = self.depth(removal.clear)
        rehazed = self.production(removal.clear, depth, removal.density, self._production_airlight(removal))
        density, airlight = self._random_haze(clear)
        with torch.no_grad():
            clear_depth = self.depth(clear)
        synthetic = self.production(clear, clear_depth, density, airlight)
        again = self.removal(synthetic, kind)
        return Cycles(hazy, clear, removal, depth, rehazed, density, airlight, synthetic, again)

    def _discriminator_loss(self, cycles: Cycles) -> Loss:
        """The order matters, real first: each pass updates the estimate of the spectral norms."""
        kind, fake_clear, fake_hazy = self.settings.gan, cycles.removal.clear.detach(), cycles.synthetic.detach()
        terms = {
            "discriminator_clear": discriminator_loss(*self.discriminator_clear(cycles.clear, fake_clear), kind),
            "discriminator_hazy": discriminator_loss(*self.discriminator_hazy(cycles.hazy, fake_hazy), kind),
        }
        return Loss("discriminators", sum(terms.values()), terms)

    def _generator_terms(self, cycles: Cycles) -> dict[str, tuple[float, Tensor]]:
        """name -> (weight, loss); terms without weight are not computed."""
        s, terms = self.settings, {}
        hazy, clear, rehazed = cycles.hazy, cycles.clear, cycles.rehazed
        removal, again = cycles.removal, cycles.synthetic_removal
        if s.gan_weight:
            with frozen(self.discriminator_clear, self.discriminator_hazy):
                logits = self.discriminator_clear(removal.clear), self.discriminator_hazy(cycles.synthetic)
            terms["gan"] = (s.gan_weight, sum(generator_loss(each, s.gan) for each in logits) / 2)
        if s.cycle_weight:
            terms["cycle_clear"] = (s.cycle_weight, F.l1_loss(again.clear, clear))
            terms["cycle_hazy"] = (s.cycle_weight, F.l1_loss(rehazed, hazy))
        if s.density_weight:
            terms["density"] = (s.density_weight, F.mse_loss(again.density, cycles.density))
        if s.airlight_weight and cycles.airlight is not None:
            terms["airlight"] = (s.airlight_weight, F.l1_loss(again.airlight, cycles.airlight))
        if s.perceptual_weight:
            distance = self._get_perceptual_loss().to(hazy.device)
            terms["perceptual"] = (s.perceptual_weight, distance(again.clear, clear) + distance(rehazed, hazy))
        if s.dark_channel_weight:
            terms["dark_channel"] = (s.dark_channel_weight, dark_channel_loss(removal.clear))
        if s.tv_weight:
            terms["tv"] = (s.tv_weight, total_variation(removal.clear))
        if s.identity_weight:
            with untracked_batch_norm(self.removal):  # tests have hazy images
                unchanged = self.removal(clear, s.airlight).clear
            terms["identity"] = (s.identity_weight, F.l1_loss(unchanged, clear))
        if s.dark_channel_energy_weight:
            energy = dark_channel_energy(removal.transmission, hazy, removal.airlight, **vars(s.dark_channel_energy))
            terms["dark_channel_energy"] = (s.dark_channel_energy_weight, energy)
        return terms

    def _get_perceptual_loss(self) -> PerceptualLoss:
        """The perceptual loss, created on first use: a resumed run does not call `start`."""
        if not self.perceptual_loss:
            p = self.settings.perceptual
            self.perceptual_loss = [PerceptualLoss(p.network, p.layers, p.weights, f"{self.settings.block}.perceptual")]
        return self.perceptual_loss[0]

    def _production_airlight(self, removal: Removal) -> Tensor | None:
        """The airlight for producing haze again: the learned one, else None, the production network's default."""
        return removal.airlight if self.settings.airlight == "learned" else None

    def _random_haze(self, clear: Tensor) -> tuple[Tensor, Tensor | None]:
        """Random density, one an image; with a learned airlight also a random grey airlight, which is its target."""
        n, s = len(clear), self.settings
        beta = clear.new_empty(n, 1, 1, 1).uniform_(*s.density_range)
        if s.airlight != "learned":
            return beta, None
        return beta, clear.new_empty(n, 1, 1, 1).uniform_(*s.airlight_range).expand(n, 3, 1, 1)

    @torch.no_grad()
    def sample_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """hazy, dehazed, rehazed, clear, synthetic (hazy), transmission and depth (of the clear images)."""
        hazy, clear = batch["hazy"], batch["clear"]
        removal = self.removal(hazy, self.settings.airlight)
        depth = self.depth(clear)
        beta, airlight = self._random_haze(clear)
        rehazing_airlight = self._production_airlight(removal)
        return {
            "hazy": hazy,
            "dehazed": removal.clear,
            "rehazed": self.production(removal.clear, self.depth(removal.clear), removal.density, rehazing_airlight),
            "transmission": removal.transmission,
            "clear": clear,
            "synthetic": self.production(clear, depth, beta, airlight),
            "depth": depth / depth.amax((1, 2, 3), keepdim=True),
        }


def _parameter_groups(network: torch.nn.Module, factor: float, rate: float) -> list[dict]:
    """An optimiser's groups: the encoder at ``factor`` times the learning ``rate``, then all other parameters."""
    encoder_ids = {id(p) for p in network.pyramid.encoder.parameters()} if hasattr(network, "pyramid") else set()
    parts = [[p for p in network.parameters() if (id(p) in encoder_ids) == inside] for inside in (True, False)]
    return [{"params": parts[0], "lr": factor * rate}, {"params": parts[1], "lr": rate}]
