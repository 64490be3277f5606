import inspect
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.sample_weights import (
    Decorrelation,
    DensityRatio,
    DensityRatioSettings,
    RandomFourier,
    RandomFourierSettings,
    SampleWeights,
    covariance_energy,
    fourier,
    make,
)
from utils.config import DEFAULTS

LEARNED = [RandomFourier, DensityRatio]


def correlated(samples: int, features: int, seed: int = 0) -> torch.Tensor:
    """Features that two common causes and some noise of their own make."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(samples, 2, generator=generator) @ torch.randn(2, features, generator=generator)
    return causes + 0.5 * torch.randn(samples, features, generator=generator)


def energies(z, weights):
    """Squares beside the diagonal of numpy's weighted covariance and of the correlation that belongs to it."""
    covariance = np.cov(z.double().numpy(), rowvar=False, aweights=weights.double().numpy(), ddof=0)
    deviation = np.sqrt(np.diag(covariance))
    beside = ~np.eye(len(covariance), dtype=bool)
    return (covariance[beside] ** 2).sum(), ((covariance / np.outer(deviation, deviation))[beside] ** 2).sum()


def make_one(kind, features):
    return SampleWeights() if kind is SampleWeights else kind(features, saved=8, steps=3)


@pytest.mark.parametrize("kind", [SampleWeights, *LEARNED])
@settings(max_examples=12, deadline=None)
@given(
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    features=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
)
def test_weights_are_a_distribution(kind, batches, features, dtype, scale):
    """Also for a batch of one, batches larger than the memory, constant features and under no_grad."""
    weigh = make_one(kind, features)
    for step, size in enumerate(batches):
        z = (scale * correlated(size, features, step) + 3).to(dtype).requires_grad_()
        with torch.set_grad_enabled(step % 2 == 0):
            weights = weigh(z)
        assert weights.shape == (size,)
        assert weights.dtype == torch.float32
        assert not weights.requires_grad
        assert weights.min() >= 0
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert all(buffer.isfinite().all() for buffer in weigh.buffers())


@pytest.mark.parametrize("kind", LEARNED)
def test_features_become_less_correlated(kind):
    weigh = kind(6, **({"balance": 0.01} if kind is RandomFourier else {}))
    before = after = np.zeros(2)
    for z in correlated(320, 6).split(64):
        weights = weigh(z)
        before = before + energies(z, torch.ones(64))
        after = after + energies(z, weights)
        assert 1 / weights.square().sum() > 16  # no handful of samples takes it all
    assert (after < [0.6, 0.95] * before).all()


def test_random_fourier_lowers_what_it_minimises_without_a_collapse():
    """Even where the balance leaves nothing to keep the weights alike."""
    z = correlated(8, 512)
    weights = RandomFourier(512, balance=1e-3)(z)
    draws = torch.randn(30), 2 * math.pi * torch.rand(30, 512)
    energy = [covariance_energy(fourier(z, *draws), w).mean() for w in (weights, torch.full((8,), 1 / 8))]
    assert energy[0] < 0.97 * energy[1]
    assert weights.max() < 0.5


@pytest.mark.parametrize("kind", LEARNED)
def test_a_resumed_run_equals_the_uninterrupted_one(kind):
    batches = [correlated(size, 5, size) for size in (3, 4, 2, 9, 1, 4, 3)]
    whole, first, resumed = (kind(5, seed=3, saved=6, **({"every": 3} if kind is DensityRatio else {})) for _ in "123")
    expected = [whole(z) for z in batches]
    for z in batches[:4]:
        first(z)
    resumed.load_state_dict(first.state_dict())
    for z, weights in zip(batches[4:], expected[4:], strict=True):
        assert torch.equal(resumed(z), weights)
    assert all(torch.equal(resumed.state_dict()[key], value) for key, value in whole.state_dict().items())
    assert not list(whole.parameters())  # nothing that an optimiser of the method could take


@pytest.mark.parametrize("kind", LEARNED)
def test_random_numbers_come_from_its_own_generator(kind):
    z, states = correlated(6, 5), []
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
        found.append(kind(5, seed=7)(z))
        assert torch.equal(torch.get_rng_state(), states[-1])
    assert torch.equal(*found)
    assert not torch.equal(found[0], kind(5, seed=8)(z))
    later = kind(5, seed=7)
    later.counts[0] = 10  # a step in which the classifier, too, is trained
    assert not torch.equal(found[0], later(z))


@pytest.mark.parametrize("kind", LEARNED)
def test_mixed_precision_around_it_changes_nothing(kind):
    z = correlated(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = kind(16)(z)
    assert torch.equal(found, kind(16)(z))


@pytest.mark.parametrize("kind", LEARNED)
def test_overflowing_features_are_not_stored(kind):
    weigh = kind(4)
    z = correlated(5, 4)
    z[0], z[1, 2] = float("nan"), float("inf")
    weigh(z)
    assert weigh(correlated(5, 4, 1)).isfinite().all()
    assert weigh.features.isfinite().all()


def test_the_memory_is_a_mean_first_then_a_moving_average():
    """Places are filled in turn; a batch of more samples than places leaves its first ones."""
    weigh, came = RandomFourier(2, saved=2, steps=1), []
    for step in range(14):
        came.append(correlated(2, 2, step))
        weigh(torch.cat([came[-1], torch.full((step % 3, 2), 99.0)]))
    expected = torch.stack(came[:10]).mean(0)
    for z in came[10:]:
        expected = 0.9 * expected + 0.1 * z
    assert weigh.counts.tolist() == [14, 28]
    assert torch.allclose(weigh.features, expected, atol=1e-5)


def test_the_memory_holds_the_latest_samples_for_the_density_ratio():
    weigh, z = DensityRatio(2, saved=3), correlated(5, 2)
    for piece in z.split(1):
        weigh(piece)
    assert torch.equal(weigh.features, z[[3, 4, 2]])


def test_the_memory_counts():
    z, new = correlated(6, 5), RandomFourier(5, balance=0.01)
    old = RandomFourier(5, balance=0.01)
    old(correlated(6, 5, 1))
    new.counts[0] = 1  # the same step and so the same draws
    assert not torch.allclose(old(z), new(z))


def test_the_classifier_is_trained_anew_now_and_then():
    weigh, seen = DensityRatio(3, every=3), []
    for step in range(7):
        weigh(correlated(4, 3, step))
        seen.append(weigh.layer0.clone())
    assert [torch.equal(a, b) for a, b in pairwise(seen)] == [True, True, False, True, True, False]


@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_covariance_energy_is_that_of_numpy(samples, features, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, features, dtype=torch.float64, generator=generator)
    weights = torch.rand(samples, dtype=torch.float64, generator=generator).add(0.01)
    weights /= weights.sum()
    covariance = np.cov(z.numpy().T, aweights=weights.numpy(), ddof=0).reshape(features, features)
    expected = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    assert covariance_energy(z, weights).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_fourier_features_by_a_loop():
    x, frequency, phase = correlated(5, 4), torch.randn(3), 6 * torch.rand(3, 4)
    found = fourier(x, frequency, phase)
    for r in range(3):
        for n in range(5):
            angles = [float(x[n, f] * frequency[r] + phase[r, f]) for f in range(4)]
            low, high = min(angles), max(angles)
            for f in range(4):
                angle = (angles[f] - low) / (high - low) * math.pi / 2
                expected = math.sqrt(2 / 3) * (math.cos(angle) + math.sin(angle))
                assert found[r, n, f].item() == pytest.approx(expected, abs=1e-5)


def test_settings_make_each_kind():
    fourier_settings, ratio_settings = RandomFourierSettings(4, 0.2, 2, 1.0, 3.0, 0.5), DensityRatioSettings(5, 6, 0.1)
    made = {
        k: make(Decorrelation(k, 9, fourier_settings, ratio_settings), 7) for k in ("random_fourier", "density_ratio")
    }
    assert isinstance(one := made["random_fourier"], RandomFourier)
    assert (one.steps, one.learning_rate, one.functions, one.balance, one.power, one.momentum) == (4, 0.2, 2, 1, 3, 0.5)
    assert isinstance(other := made["density_ratio"], DensityRatio)
    assert (other.every, other.steps, other.learning_rate) == (5, 6, 0.1)
    assert one.features.shape == other.features.shape == (9, 7)
    none = make(Decorrelation("none", 9, fourier_settings, ratio_settings), 7)
    assert torch.equal(none(torch.rand(4, 7)), torch.full((4,), 0.25))


def test_configs_yml_equals_the_class_defaults():
    block = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["kanet"]["sample_weights"]
    for kind, name in ((RandomFourier, "random_fourier"), (DensityRatio, "density_ratio")):
        defaults = {key: p.default for key, p in inspect.signature(kind).parameters.items()}
        assert defaults.pop("saved") == block["saved"]
        assert {key: defaults[key] for key in block[name]} == block[name]
