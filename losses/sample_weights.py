"""Weights of a batch's samples under which their features become uncorrelated, computed in every training step.

`RandomFourier`: StableNet (Zhang et al., "Deep Stable Learning for Out-Of-Distribution Generalization", CVPR 2021);
`DensityRatio`: SRDO (Shen et al., "Stable Learning via Sample Reweighting", AAAI 2020). Both keep a memory of samples
from earlier batches, since a batch alone is too small to separate real correlations from chance.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config import Count, Fraction, Range

HIDDEN = (100, 5)  # units of the classifier that separates real samples from permuted ones
LAYERS = ("layer0", "layer1", "layer2")
Positive = Annotated[float, Range(above=0)]


@dataclass
class RandomFourierSettings:
    steps: Count
    learning_rate: Positive
    functions: Count
    balance: Positive
    power: Annotated[float, Range(1)]
    momentum: Fraction


@dataclass
class DensityRatioSettings:
    every: Count
    steps: Count
    learning_rate: Positive


@dataclass
class Decorrelation:
    """The kind of sample weights, the size of their memory in samples, and the arguments of each kind."""

    kind: Literal["random_fourier", "density_ratio", "none"]
    saved: Count
    random_fourier: RandomFourierSettings
    density_ratio: DensityRatioSettings


def make(settings: Decorrelation, features: int, seed: int = 0) -> "SampleWeights":
    """The sample weights specified by ``settings``; ``features`` is the number of features of a sample."""
    if settings.kind == "none":
        return SampleWeights()
    kind = {"random_fourier": RandomFourier, "density_ratio": DensityRatio}[settings.kind]
    return kind(features, seed, settings.saved, **dataclasses.asdict(getattr(settings, settings.kind)))


class SampleWeights(nn.Module):
    """A batch's features (B,F), of any float type -> its samples' weights (B,), float32, at least 0, of sum 1.

    No gradient flows to the features. This class weights all samples equally.
    """

    def forward(self, z: Tensor) -> Tensor:
        return torch.full((len(z),), 1 / len(z), device=z.device)


class _Learned(SampleWeights):
    """Weights softmax(score) with a memory: the features of ``saved`` samples, a ring buffer.

    The released codes tie the memory's size to the batch's; a fixed one lets the batch size change. The memory, the
    step and the number of samples seen are buffers, and random numbers come from a generator seeded by (``seed``,
    step) alone, so that a run resumed from the state_dict equals the uninterrupted one.
    """

    def __init__(self, features: int, seed: int, saved: int):
        super().__init__()
        self.seed = seed
        self.register_buffer("features", torch.zeros(saved, features))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.long))  # steps, samples seen

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        counts = self.counts
        super()._apply(fn, recurse)
        self.counts = counts  # always on the CPU: reading them from a GPU in every step would synchronise
        return self

    def forward(self, z: Tensor) -> Tensor:
        z = z.detach().float().nan_to_num(0, 0, 0)  # fp16 overflows must not enter the memory
        step, seen = self.counts.tolist()
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((self.seed, step)).generate_state(1)[0]))
        with torch.autocast(z.device.type, enabled=False), torch.enable_grad():
            score = self._score(z, min(seen, len(self.features)), step, generator).detach()
        with torch.no_grad():
            stored = min(len(z), len(self.features))
            order = seen + torch.arange(stored, device=z.device)
            self._store(z[:stored], score[:stored], order % len(self.features), order // len(self.features))
            self.counts += torch.tensor([1, stored])
        return score.softmax(0)

    def _score(self, z: Tensor, filled: int, step: int, generator: torch.Generator) -> Tensor:
        """The scores (B,) of ``z``, computed together with the memory's first ``filled`` entries."""
        raise NotImplementedError

    def _store(self, z: Tensor, score: Tensor, entries: Tensor, writes: Tensor) -> None:
        """Write samples to the ``entries`` (indices) of the memory, which were written ``writes`` times before."""
        self.features[entries] = z


class RandomFourier(_Learned):
    """StableNet's weights: softmax(w), w minimising L_b / ``balance`` + sum(softmax(w)^``power``) in ``steps`` steps.

    L_b (`covariance_energy`) is the squared covariance of `fourier` features of batch and memory, drawn anew in every
    step. An entry of the memory, features and w, is the mean of its samples, later a moving average of ``momentum``.
    Defaults are the released code's, except for the optimiser: its SGD (learning rate 1, momentum 0.9) depends on the
    numbers of features and samples and gives one sample all the weight if ``balance`` is small; Adam does neither. The
    learning rate falls tenfold halfway, as there. Unused options there (decay of ``balance``, a factor on the first
    epoch) are left out.
    """

    def __init__(
        self,
        features: int,
        seed: int = 0,
        saved: int = 64,
        steps: int = 20,
        learning_rate: float = 0.1,
        functions: int = 1,
        balance: float = 70.0,
        power: float = 2.0,
        momentum: float = 0.9,
    ):
        super().__init__(features, seed, saved)
        self.register_buffer("scores", torch.zeros(saved))
        self.steps = steps
        self.learning_rate = learning_rate
        self.functions = functions
        self.balance = balance
        self.power = power
        self.momentum = momentum

    def _score(self, z: Tensor, filled: int, step: int, generator: torch.Generator) -> Tensor:
        x = torch.cat([z, self.features[:filled]])
        w = torch.ones(len(z), device=z.device, requires_grad=True)
        optimiser = torch.optim.Adam([w], self.learning_rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, math.ceil(self.steps / 2), 0.1)
        for _ in range(self.steps):
            frequency = torch.randn(self.functions, generator=generator).to(x.device)
            phase = (2 * math.pi * torch.rand(self.functions, x.shape[1], generator=generator)).to(x.device)
            weights = torch.cat([w, self.scores[:filled]]).softmax(0)
            loss = covariance_energy(fourier(x, frequency, phase), weights).sum() / self.balance
            loss = loss + w.softmax(0).pow(self.power).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return w

    def _store(self, z: Tensor, score: Tensor, entries: Tensor, writes: Tensor) -> None:
        momentum = (writes / (writes + 1)).clamp(max=self.momentum)  # the released 0.9: a mean over the first 10 writes
        self.features[entries] = torch.lerp(z, self.features[entries], momentum[:, None])
        self.scores[entries] = torch.lerp(score, self.scores[entries], momentum)


class DensityRatio(_Learned):
    """SRDO's weights 1/p - 1, scaled to sum 1; p is a classifier's probability that a sample is real.

    The others are real ones with every feature permuted on its own: under these weights, the features of real samples
    look independent. The classifier (100 and 5 units, as in CGID, TCSVT 2024, by KA-Net's first author) is trained
    from scratch every ``every`` steps on batch and memory, by ``steps`` steps of Adam with a new permutation each. The
    few steps regularise it: trained to convergence on one permutation, it overfits the samples.
    """

    def __init__(
        self,
        features: int,
        seed: int = 0,
        saved: int = 64,
        every: int = 10,
        steps: int = 10,
        learning_rate: float = 0.01,
    ):
        super().__init__(features, seed, saved)
        self.every = every
        self.steps = steps
        self.learning_rate = learning_rate
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        for name, (inputs, outputs) in zip(LAYERS, pairwise((features, *HIDDEN, 1)), strict=True):
            self.register_buffer(name, torch.zeros(outputs, inputs + 1))  # the bias is the last column

    def _score(self, z: Tensor, filled: int, step: int, generator: torch.Generator) -> Tensor:
        if step % self.every == 0:
            self._train(torch.cat([z, self.features[:filled]]), generator)
        return -self._logits((z - self.mean) / self.scale, self._layers())  # log(1/p - 1)

    def _train(self, x: Tensor, generator: torch.Generator) -> None:
        spread, mean = torch.std_mean(x, 0, correction=0)
        self.mean.copy_(mean)
        self.scale.copy_(spread.where(spread > 0, 1))
        x = (x - self.mean) / self.scale
        layers = [_initial(layer, generator).requires_grad_() for layer in self._layers()]
        optimiser = torch.optim.Adam(layers, self.learning_rate)
        real = torch.arange(2 * len(x), device=x.device) < len(x)
        for _ in range(self.steps):
            permuted = x.gather(0, torch.rand(x.shape, generator=generator).to(x.device).argsort(0))
            loss = F.binary_cross_entropy_with_logits(self._logits(torch.cat([x, permuted]), layers), real.float())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self._layers(), layers)

    def _layers(self) -> list[Tensor]:
        return [getattr(self, name) for name in LAYERS]

    @staticmethod
    def _logits(x: Tensor, layers: list[Tensor]) -> Tensor:
        for layer in layers[:-1]:
            x = F.linear(x, layer[:, :-1], layer[:, -1]).relu()
        return F.linear(x, layers[-1][:, :-1], layers[-1][:, -1]).squeeze(1)


def fourier(x: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    """Random Fourier features as in StableNet's code. (N,F), (R,), (R,F) -> (R,N,F).

    The angle is x * frequency + phase; each sample's angles are scaled over its features to [0, pi/2]; the result is
    sqrt(2/R) * (cos + sin). One frequency is used for all features.
    """
    angle = x * frequency[:, None, None] + phase[:, None]
    angle = angle - angle.amin(-1, keepdim=True)
    angle = angle / angle.amax(-1, keepdim=True).clamp(min=1e-12) * (math.pi / 2)
    return math.sqrt(2 / len(frequency)) * (angle.cos() + angle.sin())


def covariance_energy(x: Tensor, weights: Tensor) -> Tensor:
    """Sum of the squared covariances of all pairs of features under sample weights (N,) of sum 1. (...,N,F) -> (...).

    The squares of C = X'WX, X centred, sum to those of the samples' products XX', weighted on both sides: N x N
    numbers instead of F x F.
    """
    centred = x - (weights[:, None] * x).sum(-2, keepdim=True)
    products = centred @ centred.mT
    variances = (weights[:, None] * centred.square()).sum(-2)
    return (weights[:, None] * weights * products.square()).sum((-2, -1)) - variances.square().sum(-1)


def _initial(layer: Tensor, generator: torch.Generator) -> Tensor:
    """Initial weights in the shape of ``layer``, drawn as by `nn.Linear`."""
    bound = (layer.shape[1] - 1) ** -0.5
    return torch.empty(layer.shape).uniform_(-bound, bound, generator=generator).to(layer.device)
