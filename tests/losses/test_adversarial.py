import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.adversarial import discriminator_loss, generator_loss

KINDS = ("lsgan", "vanilla", "hinge")

UNDECIDED = {"lsgan": (0.25, 0.25), "vanilla": (math.log(2), math.log(2)), "hinge": (1.0, 0.0)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_undecided_discriminator_has_the_known_loss(kind):
    logits = torch.zeros(2, 1, 3, 3)
    of_discriminator, of_generator = UNDECIDED[kind]
    assert discriminator_loss(logits, logits, kind).item() == pytest.approx(of_discriminator)
    assert generator_loss(logits, kind).item() == pytest.approx(of_generator)


@settings(max_examples=30, deadline=None)
@given(st.floats(-20, 20), st.floats(-20, 20))
def test_closed_forms(real, fake):
    r, f = torch.full((1, 1, 2, 2), real), torch.full((1, 1, 2, 2), fake)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = {
        "lsgan": ((sigmoid(real) - 1) ** 2 + sigmoid(fake) ** 2) / 2,
        "vanilla": (math.log1p(math.exp(-real)) + math.log1p(math.exp(fake))) / 2,
        "hinge": (max(0, 1 - real) + max(0, 1 + fake)) / 2,
    }
    of_generator = {"lsgan": (sigmoid(fake) - 1) ** 2, "vanilla": math.log1p(math.exp(-fake)), "hinge": -fake}
    for kind in KINDS:
        assert discriminator_loss(r, f, kind).item() == pytest.approx(expected[kind], abs=1e-5)
        assert generator_loss(f, kind).item() == pytest.approx(of_generator[kind], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generator_and_discriminator_losses_oppose_each_other(kind):
    """The discriminator lowers a fake's score, the generator raises it; a score of 1e4 stays finite."""
    fake = torch.zeros(1, 1, 2, 2, requires_grad=True)
    down = torch.autograd.grad(discriminator_loss(fake.detach(), fake, kind), fake)[0]
    up = torch.autograd.grad(generator_loss(fake, kind), fake)[0]
    assert (down > 0).all()
    assert (up < 0).all()
    far = torch.full((1, 1, 2, 2), 1e4)
    assert discriminator_loss(-far, far, kind).isfinite()


def test_half_precision_logits_lose_nothing():
    logits = torch.full((1, 1, 2, 2), 9.0, dtype=torch.bfloat16)
    assert discriminator_loss(logits, logits, "vanilla").dtype == torch.float32
