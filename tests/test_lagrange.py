"""Lagrange polynomials and their integrals, which every multistep weight is made of; and one velocity of the angle path."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial

from scoresde import VPSDE
from scoresde.flow import AnglePath, rotated_velocity, rotation
from scoresde.numerics import lagrange, lagrange_integrals, legendre
from scoresde.samplers import Angle
from scoresde.samplers.exponential import Points


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_one_at_their_own_knot(k):
    """The values at the knots are the identity, and their sum is 1 anywhere, for many sets of knots at once."""
    knots = np.cumsum(np.random.default_rng(0).uniform(0.5, 1.5, (k, 7)), 0)
    at = knots.T[:, None, :]  # (7, 1, k): the knots of each set
    np.testing.assert_allclose(
        lagrange(knots[..., None, None], at)[:, :, 0].swapaxes(0, 1), np.tile(np.eye(k), (7, 1, 1))
    )
    np.testing.assert_allclose(lagrange(knots, np.full(7, 2.3)).sum(0), 1.0, rtol=1e-12)


def test_integrals_of_polynomials():
    """Against antiderivatives, exactly, for each of several intervals with knots of its own."""
    knots = np.array([[0.0, 1.0], [0.5, 3.0], [2.0, 3.5]])  # (3 knots, 2 sets)
    start, end = np.array([0.2, -1.0]), np.array([1.7, 2.5])
    at, weights = legendre(4)
    half = 0.5 * (end - start)[:, None]
    got = lagrange_integrals(knots, start[:, None] + half * (1 + at), half * weights)
    for n in range(2):
        for j in range(3):
            others = [knots[i, n] for i in range(3) if i != j]
            basis = Polynomial.fromroots(others)
            whole = (basis / basis(knots[j, n])).integ()
            assert got[j, n] == pytest.approx(whole(end[n]) - whole(start[n]), rel=1e-13)


def test_knots_are_not_written_to():
    """The caller's arrays stay as they are."""
    knots, at = np.array([1.0, 2.0, 3.0]), np.array(1.5)
    lagrange(knots, at)
    assert knots.tolist() == [1.0, 2.0, 3.0]


def test_one_rotation_for_tensors_and_arrays():
    """theta and S of the angle path from (alpha, sigma) or from the ratio r alone, in torch and in NumPy."""
    sde, c = VPSDE(), 0.6
    t = torch.linspace(0.01, 1.0, 9, dtype=torch.float64)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    theta, scale = rotation(alpha, sigma, c)
    torch.testing.assert_close(torch.tan(theta), sigma / (alpha * c))
    torch.testing.assert_close(scale**2, (alpha * c) ** 2 + sigma**2)
    for one, other in zip(rotation(alpha.numpy(), sigma.numpy(), c), (theta, scale), strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-15)
    r = (sigma / alpha).numpy()
    np.testing.assert_allclose(rotation(1.0, r, c)[0], theta.numpy(), rtol=1e-14)
    path = AnglePath(sde, c)
    assert torch.equal(path.angle(t), theta)
    assert torch.equal(path.scale(t), scale)


def test_one_velocity_in_x_and_in_the_output():
    """Applied to the coefficients of D and eps_hat it gives those of the velocity, as the samplers take it."""
    sde, c = VPSDE(), 0.6
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = (v.numpy() for v in (sde.alpha(t), sde.sigma(t)))
    affine = [np.zeros(3), np.ones(3), 1 / sigma, -alpha / sigma]  # of a network of the denoiser
    p, q = Angle(c).combination(affine, Points.of(sde, t))
    x, denoised = 0.7, -0.3
    for i in range(3):
        theta = math.atan2(sigma[i], alpha[i] * c)
        noise = (x - alpha[i] * denoised) / sigma[i]
        expected = rotated_velocity(math.cos(theta), math.sin(theta) / c, denoised, noise)
        assert expected == pytest.approx(math.cos(theta) * noise - math.sin(theta) * denoised / c)
        assert p[i] * x + q[i] * denoised == pytest.approx(expected, rel=1e-12)
