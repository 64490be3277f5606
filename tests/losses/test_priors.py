import pytest
import torch

from losses.priors import dark_channel_energy, dark_channel_loss, matting_energy, total_variation
from utils.physics import dark_channel_transmission


def test_total_variation_of_a_ramp():
    """A ramp of a step a column: that step a pixel, and nothing from row to row."""
    ramp = (torch.arange(10) * 0.05).expand(2, 3, 8, 10)
    assert total_variation(ramp).item() == pytest.approx(0.05)
    assert total_variation(ramp.transpose(2, 3)).item() == pytest.approx(0.05)
    assert total_variation(torch.full((1, 3, 4, 4), 0.3)).item() == 0
    checker = (torch.arange(6)[:, None] + torch.arange(6)).remainder(2).float().expand(1, 3, 6, 6)
    assert total_variation(checker).item() == 2


def test_dark_channel_loss():
    image = torch.full((1, 3, 30, 30), 0.6)
    assert dark_channel_loss(image).item() == pytest.approx(0.6)
    image[:, 2] = 0.1
    assert dark_channel_loss(image).item() == pytest.approx(0.1)
    image[0, 1, 15, 15] = 0  # one dark pixel darkens its 15x15 neighbourhood
    assert dark_channel_loss(image).item() == pytest.approx(0.1 * (1 - 225 / 900))


def matting_laplacian(guide: torch.Tensor, ridge: float) -> torch.Tensor:
    """The dense matrix of one image (3,H,W), window by window and entry by entry (Levin et al., eq. 12)."""
    _, height, width = guide.shape
    L = torch.zeros(height * width, height * width, dtype=guide.dtype)
    for top in range(height - 2):
        for left in range(width - 2):
            places = [(top + i) * width + left + j for i in range(3) for j in range(3)]
            colours = guide.flatten(1)[:, places]
            centred = colours - colours.mean(1, keepdim=True)
            spread = centred @ centred.T / 9 + ridge / 9 * torch.eye(3, dtype=guide.dtype)
            share = torch.eye(9, dtype=guide.dtype) - (1 + centred.T @ spread.inverse() @ centred) / 9
            L[torch.tensor(places)[:, None], places] += share
    return L


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_matting_energy_against_the_dense_matrix(dtype, exact, ridge):
    torch.manual_seed(3)
    guide, t = torch.rand(2, 3, 7, 9, dtype=torch.float64), torch.rand(2, 1, 7, 9, dtype=torch.float64)
    guide[1, :, :, 4:] = 0.3  # without texture, where covariances have no inverse but for the ridge
    got = matting_energy(t.to(dtype), guide.to(dtype), ridge)
    for k in range(2):
        flat = t[k].flatten()
        assert got[k].item() == pytest.approx((flat @ matting_laplacian(guide[k], ridge) @ flat).item(), rel=exact)


def test_matting_energy_of_an_affine_function_of_the_image_is_the_ridge():
    """A t that is a line in the picture's colours costs the ridge alone; a level costs nothing."""
    guide = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    follows = guide * torch.tensor([0.2, -0.3, 0.4]).view(3, 1, 1)
    assert matting_energy(follows.sum(1, keepdim=True) + 0.1, guide).item() < 36 * 1e-6
    assert matting_energy(torch.full_like(guide[:, :1], 0.7), guide).item() == pytest.approx(0, abs=1e-20)


def test_gradients_of_the_dark_channel_energy():
    torch.manual_seed(4)
    hazy, t = torch.rand(2, 3, 5, 6, dtype=torch.float64), torch.rand(2, 1, 5, 6, dtype=torch.float64)
    t, A = t.requires_grad_(), torch.tensor([0.8, 0.9], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    energy = lambda t: dark_channel_energy(t, hazy, A, fidelity=0.01, omega=0.95, size=3)  # noqa: E731
    assert torch.autograd.gradcheck(energy, (t,))
    got = torch.autograd.grad(energy(t), t)[0]  # the closed form: 2 (L t + fidelity (t - t_dcp)) / pixels
    prior = dark_channel_transmission(hazy, A, 0.95, 3)
    for k in range(2):
        smooth = (matting_laplacian(hazy[k], 1e-6) @ t[k].flatten()).view_as(t[k])
        torch.testing.assert_close(got[k], 2 * (smooth + 0.01 * (t[k] - prior[k])) / 60, rtol=1e-6, atol=1e-9)


def test_the_minimum_energy_is_soft_matting_of_the_prior():
    """(L + fidelity) t = fidelity t_dcp (DCP, eq. 15) has a smaller energy than any other t that is tried."""
    torch.manual_seed(5)
    hazy, A = torch.rand(1, 3, 6, 7, dtype=torch.float64), torch.full((1, 3, 1, 1), 0.9, dtype=torch.float64)
    L, prior = matting_laplacian(hazy[0], 1e-6), dark_channel_transmission(hazy, A, 0.95, 3)
    best = torch.linalg.solve(L + 0.1 * torch.eye(42, dtype=torch.float64), 0.1 * prior.flatten()).view(1, 1, 6, 7)
    energy = lambda t: dark_channel_energy(t, hazy, A, fidelity=0.1, omega=0.95, size=3).item()  # noqa: E731
    least = energy(best)
    assert all(energy(best + 1e-3 * torch.randn_like(best)) > least for _ in range(10))
