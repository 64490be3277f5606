import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.frequency import frequency_loss, scaled


def whole_spectrum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As the released code writes it: two full transforms, real and imaginary parts side by side."""
    spectra = [torch.view_as_real(torch.fft.fft2(x)) for x in (a, b)]
    return F.l1_loss(*spectra)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_the_half_spectrum_gives_the_full_loss(height, width, seed):
    torch.manual_seed(seed)
    a, b = torch.randn(2, 2, 3, height, width)
    a.requires_grad_()
    fast, slow = frequency_loss(a, b), whole_spectrum(a, b)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, a)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_constant_difference_is_in_one_frequency():
    a = torch.zeros(1, 1, 4, 6)
    assert frequency_loss(a, a).item() == 0
    assert frequency_loss(a + 0.5, a).item() == pytest.approx(0.5 * 24 / (2 * 24))


def test_half_precision_is_transformed_in_float32():
    a, b = torch.rand(2, 1, 3, 8, 8).bfloat16()
    assert frequency_loss(a, b).dtype == torch.float32


def test_targets_at_three_scales():
    clear = torch.rand(2, 3, 8, 12)
    quarter, half, whole = scaled(clear, (0.25, 0.5, 1))
    cells = clear.unflatten(3, (3, 4)).unflatten(2, (2, 4))
    torch.testing.assert_close(quarter, cells[:, :, :, 1:3, :, 1:3].mean((3, 5)))
    torch.testing.assert_close(half, F.avg_pool2d(clear, 2))
    assert whole is clear
