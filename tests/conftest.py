"""Shared fixtures: exact mixtures, the six processes, and the devices."""

import math

import pytest
import torch

from scoresde import EDMSDE, VESDE, VPSDE, CosineSDE, GaussianMixture, RectifiedFlow, SubVPSDE


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU; skipped where there is none")
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Each device that this machine has."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param


@pytest.fixture(
    params=[VPSDE(), SubVPSDE(), VESDE(), CosineSDE(), EDMSDE(), RectifiedFlow()], ids=lambda s: type(s).__name__
)
def sde(request):
    """Each built-in process with its defaults."""
    return request.param


@pytest.fixture(scope="session")
def ring8():
    """Eight narrow Gaussians on the unit circle, mean zero (a centred problem: the prior fits to second order)."""
    a = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    return GaussianMixture.isotropic(torch.stack([a.cos(), a.sin()], 1), 0.07)


@pytest.fixture(scope="session")
def full3():
    """Three correlated Gaussians in 3D with unequal weights and a mean away from zero."""
    g = torch.Generator().manual_seed(3)
    roots = 0.4 * torch.randn(3, 3, 3, generator=g, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.05 * torch.eye(3, dtype=torch.float64)
    means = torch.randn(3, 3, generator=g, dtype=torch.float64)
    return GaussianMixture([0.5, 0.3, 0.2], means, covariances)


@pytest.fixture(scope="session")
def image16():
    """Two smooth Gaussian clouds of 1 x 4 x 4 images within (-1, 1), mean zero."""
    g = torch.Generator().manual_seed(4)
    pattern = 0.35 * torch.randn(1, 16, generator=g, dtype=torch.float64).clamp(-1, 1)
    position = torch.arange(4, dtype=torch.float64)
    near = torch.exp(-0.5 * (position[:, None] - position) ** 2) + 0.2 * torch.eye(4, dtype=torch.float64)
    covariance = 0.01 * torch.kron(near, near)
    return GaussianMixture(
        [0.5, 0.5], torch.cat([pattern, -pattern]), covariance.expand(2, 16, 16), event_shape=(1, 4, 4)
    )
