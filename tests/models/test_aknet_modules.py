"""AKNet's quick forms against the same computed as it is written, and their gradients."""

import aknet_reference as naive
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.aknet import fusion, official
from models.aknet.network import KERNEL, AKNetNetwork, fast_size, filtered, large_kernel

sides = st.integers(1, 9)
quick = settings(max_examples=25, deadline=None)


def doubles(*shape: int, gradient: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=gradient)


def assert_same(quick_form, naive_form, *inputs: Tensor) -> None:
    """The same numbers, and the same gradients for all inputs that want one."""
    pair = quick_form(*inputs), naive_form(*inputs)
    torch.testing.assert_close(*pair)
    wanted = [x for x in inputs if x.requires_grad]
    towards = torch.randn_like(pair[0])
    for one, other in zip(*(torch.autograd.grad(out, wanted, towards) for out in pair), strict=True):
        torch.testing.assert_close(one, other)


def random_network(width: int = 8) -> AKNetNetwork:
    """Weights with which every part matters: kernels that vary, a frequency gate that is not shut."""
    network = AKNetNetwork(width).double()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "fgm.alpha" in name or (".low." in name or ".high." in name):
                p.normal_()
    return network


@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("size", [(8, 8), (36, 44)])
def test_network_and_gradients(size, border):
    network, x = random_network(), torch.rand(2, 3, *size, dtype=torch.float64)
    released = official.export(network.state_dict())
    for value in released.values():
        value.requires_grad_()
    outputs = network(x, border), naive.network(released, x, border)
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for found in outputs:
        sum(y.square().sum() for y in found).backward()
    gradients = {key: value.grad for key, value in released.items() if key not in official.UNUSED}
    ours = official.export({name: p.grad for name, p in network.named_parameters()})
    for key in gradients.keys() - official.WINDOWS.keys():
        atol = 1e-9 + 1e-6 * gradients[key].abs().max().item()  # some cancel: what a normalisation takes away again
        torch.testing.assert_close(ours[key], gradients[key], rtol=1e-5, atol=atol)


def test_a_closed_gate_is_skipped_without_gradients(monkeypatch):
    network, x = AKNetNetwork(8), torch.rand(1, 3, 16, 16)
    expected = network(x)[-1]
    monkeypatch.setattr("models.aknet.network.filtered", lambda *_: pytest.fail("a gate of zeros was computed"))
    with torch.no_grad():
        torch.testing.assert_close(network(x)[-1], expected)


# Fusion.


@quick
@given(sides, sides, st.sampled_from([1, 2, 4]))
def test_window_sum(height, width, planes):
    def slow(base, x, kernels):
        windows = F.unfold(x, 3, padding=1).view(2, 3, 9, 1, height, width)
        return base + (windows * kernels.unsqueeze(1)).sum(2)

    x, kernels = doubles(2, 3, height, width, gradient=True), doubles(2, 9, planes, height, width, gradient=True)
    for base in (doubles(1, 3, 1, 1, 1, gradient=True), doubles(2, 3, planes, height, width, gradient=True)):
        assert_same(fusion.window_sum, slow, base, x, kernels)


@quick
@given(sides, sides)
def test_folded_kernels(height, width):
    """The 5x5 window of an up-sampled map sees 3x3 pixels of its source."""
    x, kernels = doubles(2, 3, height, width, gradient=True), doubles(2, 25, 2 * height, 2 * width, gradient=True)

    def fast(x, kernels):
        planes = fusion.window_sum(torch.zeros(1, dtype=torch.float64), x, fusion.fold(kernels))
        return F.pixel_shuffle(planes.flatten(1, 2), 2)

    def slow(x, kernels):
        return naive.carafe(F.interpolate(x, scale_factor=2), kernels, "zero")

    assert_same(fast, slow, x, kernels)


@quick
@given(st.integers(3, 9), st.integers(3, 9), st.sampled_from([3, 5]))
def test_reflection_by_kernels(height, width, side):
    x, kernels = doubles(2, 3, height, width, gradient=True), doubles(2, side**2, height, width, gradient=True)

    def fast(x, kernels):
        return naive.carafe(x, fusion.reflected(kernels), "zero")

    assert_same(fast, lambda x, kernels: naive.carafe(x, kernels, "reflect"), x, kernels)


@pytest.mark.parametrize("border", ["zero", "reflect"])
def test_kernels_are_normalised(border):
    low, high = fusion.Fusion(8).kernels(torch.randn(1, 8, 12, 20), torch.randn(1, 16, 6, 10), border)
    assert (low.shape, high.shape) == ((1, 25, 12, 20), (1, 9, 12, 20))
    if border == "zero":
        torch.testing.assert_close(low.sum(1), torch.ones(1, 12, 20))
        torch.testing.assert_close(high.sum(1), torch.ones(1, 12, 20))


def test_hamming_windows():
    torch.testing.assert_close(fusion.hamming(5)[2], torch.tensor([0.08, 0.54, 1, 0.54, 0.08]))
    torch.testing.assert_close(fusion.hamming(3)[0], torch.tensor([0.0064, 0.08, 0.0064]))


# Frequencies.


@quick
@given(sides, sides)
def test_frequency_gate(height, width):
    signal, gate = doubles(2, 3, height, width, gradient=True), doubles(2, 3, height, width, gradient=True)
    assert_same(filtered, lambda q, p: torch.fft.ifft2(p * torch.fft.fft2(q)).abs(), signal, gate)


def test_frequency_gate_of_zeros_has_a_finite_gradient():
    signal, gate = torch.zeros(1, 1, 4, 4, requires_grad=True), torch.ones(1, 1, 4, 4, requires_grad=True)
    filtered(signal, gate).sum().backward()
    assert signal.grad.isfinite().all()
    assert gate.grad.isfinite().all()


@pytest.mark.parametrize("kernel", [(KERNEL, KERNEL), (1, KERNEL), (KERNEL, 1), (3, 5)])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (33, 32), (40, 70)])
def test_large_kernels(size, kernel):
    x, weight, bias = doubles(2, 2, *size, gradient=True), doubles(2, 1, *kernel, gradient=True), doubles(2)

    def direct(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=[side // 2 for side in kernel], groups=2)

    assert_same(large_kernel, direct, x, weight, bias)


@given(st.integers(1, 3000))
def test_fast_sizes(size):
    def smooth(n):
        return n == 1 or any(n % p == 0 and smooth(n // p) for p in (2, 3, 5))

    found = fast_size(size)
    assert found == next(n for n in range(size, 2 * size + 2) if n % 2 == 0 and smooth(n))
