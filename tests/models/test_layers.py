"""The quick layers against PyTorch's own: outputs, gradients, statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from models import layers

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def gradients(y: Tensor, *of: Tensor) -> list[Tensor]:
    """Of some fixed scalar that depends on every value of ``y`` in its own way."""
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), of))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reflection_padding_keeps_the_type(dtype):
    x = layers.channels_last(torch.rand(2, 3, 8, 9).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        padded = layers.reflect(x, 3)
    assert padded.dtype == dtype
    assert torch.equal(padded, F.pad(x.float(), (3,) * 4, mode="reflect").to(dtype))


@pytest.mark.parametrize(("pad", "height", "width"), [(1, 2, 40), (1, 64, 65), (3, 4, 33), (3, 5, 64)])
def test_the_gradient_of_reflection(monkeypatch, pad, height, width):
    monkeypatch.setattr(layers, "WIDE", 0)  # below it PyTorch's own is taken
    x = layers.channels_last(torch.randn(2, 3, height, width)).requires_grad_()
    ours, theirs = layers.reflect(x, pad), F.pad(x, (pad,) * 4, mode="reflect")
    assert torch.equal(ours, theirs)
    assert ours.grad_fn.name().startswith("_Reflect")
    torch.testing.assert_close(gradients(ours, x), gradients(theirs, x), **CLOSE)


def test_deterministic_mode_uses_the_own_gradient_of_reflection():
    x = torch.rand(1, 2, 5, 6, requires_grad=True)
    assert "_Reflect" not in layers.reflect(x, 2).grad_fn.name()
    try:
        torch.use_deterministic_algorithms(True)
        assert "_Reflect" in layers.reflect(x, 2).grad_fn.name()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_gradient_of_reflection_does_not_modify_its_input():
    """It may be another's too, as where a map is used twice, or no memory of its own, as that of a sum."""
    x = layers.channels_last(torch.randn(1, 4, 256, 257)).requires_grad_()
    assert x.numel() >= layers.WIDE
    given = torch.randn(1, 4, 262, 263)
    before = given.clone()
    [ours] = torch.autograd.grad(layers.reflect(x, 3), x, given)
    assert torch.equal(given, before)
    [theirs] = torch.autograd.grad(F.pad(x, (3,) * 4, mode="reflect"), x, given)
    torch.testing.assert_close(ours, theirs)
    layers.reflect(x, 3).sum().backward()
    assert x.grad.sum().item() == pytest.approx(4 * 262 * 263)


def test_pointwise_is_a_1x1_convolution():
    x, weight, bias = torch.randn(2, 5, 6, 7), torch.randn(4, 5, 1, 1), torch.randn(4)
    torch.testing.assert_close(layers.pointwise(x, weight, bias), F.conv2d(x, weight, bias))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_depthwise_gradients(batch, size, stride, padding):
    x = layers.channels_last(torch.randn(batch, 6, 12, 15)).requires_grad_()
    weight, bias = torch.randn(6, 1, size, size, requires_grad=True), torch.randn(6, requires_grad=True)
    ours = layers.depthwise(x, weight, bias, stride, padding)
    theirs = F.conv2d(x, weight, bias, stride, padding, groups=6)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    found = zip(gradients(ours, x, weight, bias), gradients(theirs, x, weight, bias), strict=True)
    for a, b in found:
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_in_bf16_is_near_float32(stride):
    x, weight = torch.randn(2, 6, 12, 12, requires_grad=True), torch.randn(6, 1, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = layers.depthwise(x, weight, None, stride)
    assert low.dtype == torch.bfloat16
    exact = gradients(layers.depthwise(x, weight, None, stride), x, weight)
    for a, b in zip(gradients(low.float(), x, weight), exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


def pair_of_norms() -> tuple[nn.Module, nn.Module]:
    theirs = BatchNormAct2d(5, act_layer=nn.ReLU6)
    nn.init.normal_(theirs.weight, 3.0)  # so that some values reach 6
    nn.init.normal_(theirs.bias, 1.0)
    ours = layers.BatchNorm(5, theirs.eps, theirs.momentum, theirs.act)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_with_relu6(momentum):
    ours, theirs = pair_of_norms()
    ours.momentum = theirs.momentum = momentum
    for _ in range(3):
        x = (3 * torch.randn(2, 5, 6, 7) + 1).requires_grad_()
        a, b = ours(layers.channels_last(x)), theirs(x)
        torch.testing.assert_close(a, b)
        assert (a == 6).any()
        found = gradients(a, x, *ours.parameters()), gradients(b, x, *theirs.parameters())
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_batch_statistics_of_channels_last_maps_are_exact():
    """PyTorch's are not: that is why the layer is there. Should this fail, it may have become superfluous."""
    x = layers.channels_last(torch.randn(2, 4, 64, 64) * 0.1 + 3)
    exact = F.batch_norm(x.double(), None, None, training=True)
    ours = (layers.BatchNorm(4)(x).double() - exact).abs().max()
    assert ours < 1e-5
    assert ours < 0.2 * (F.batch_norm(x, None, None, training=True).double() - exact).abs().max()


def test_batch_norm_in_bf16():
    ours, theirs = pair_of_norms()
    x = layers.channels_last(torch.randn(2, 5, 6, 7)).bfloat16()
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x).float(), theirs(x.float()), rtol=0.05, atol=0.05)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=0.2, atol=0.05)


def test_recomputed_gives_the_same_gradients():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    plain, again = gradients(net(x), x, *net.parameters()), gradients(layers.recomputed(net)(x), x, *net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_fast_layers_give_the_same_output():
    import timm

    plain = timm.create_model("tf_efficientnet_lite3", features_only=True, out_indices=(1, 2), pretrained=False)
    quick = layers.use_fast_layers(copy.deepcopy(plain))
    assert quick.state_dict().keys() == plain.state_dict().keys()
    x = torch.rand(1, 3, 64, 96)
    for mode in (True, False):
        for a, b in zip(quick.train(mode)(layers.channels_last(x)), plain.train(mode)(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
