"""Mixtures of Gaussians are the truth that other tests compare with, so they are compared with scipy here."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from scoresde import VPSDE, GaussianMixture
from scoresde.sde import expand

TIMES = (0.02, 0.3, 0.7)


def scipy_log_prob(mixture, x, alpha=1.0, sigma=0.0):
    """log sum_k w_k N(x; alpha mu_k, alpha^2 C_k + sigma^2 I) by scipy."""
    d = mixture.means.shape[1]
    terms = [
        math.log(w)
        + stats.multivariate_normal(alpha * m.numpy(), alpha**2 * c.numpy() + sigma**2 * np.eye(d)).logpdf(x)
        for w, m, c in zip(mixture.weights.tolist(), mixture.means, mixture.covariances, strict=True)
    ]
    return special.logsumexp(terms, axis=0)


@pytest.mark.parametrize("name", ["ring8", "full3", "image16"])
def test_log_prob_against_scipy(name, sde, request):
    """The density of x_t at several t, and at t per row, is the closed-form sum."""
    mixture = request.getfixturevalue(name)
    model = mixture.diffuse(sde)
    x0 = mixture.sample(16, seed=1)
    expected = torch.from_numpy(scipy_log_prob(mixture, x0.flatten(1).numpy()))
    torch.testing.assert_close(mixture.log_prob(x0), expected, rtol=1e-9, atol=1e-9)
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = []
    for t in TIMES:
        x = sde.perturb(x0, t, z)
        expected = scipy_log_prob(mixture, x.flatten(1).numpy(), float(sde.alpha(t)), float(sde.sigma(t)))
        torch.testing.assert_close(model.log_prob(x, t), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
        rows.append((x[:1], expected[0]))
    x = torch.cat([r[0] for r in rows])
    got = model.log_prob(x, torch.tensor(TIMES, dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([r[1] for r in rows]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ring8", "full3", "image16"])
@pytest.mark.parametrize("t", TIMES)
def test_score_denoiser_noise_and_velocity(name, sde, t, request):
    """score = grad log p_t by autograd; D = (x + sigma^2 score)/alpha (Tweedie); noise and velocity by definition."""
    mixture = request.getfixturevalue(name)
    model = mixture.diffuse(sde)
    z = torch.randn(16, *mixture.event_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sde.perturb(mixture.sample(16, seed=2), t, z).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
    x = x.detach()
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    close = dict(rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.score(x, t), gradient, **close)
    torch.testing.assert_close(
        model.denoise(x, t), (x + sigma**2 * gradient) / alpha, rtol=1e-8, atol=1e-8 * (1 + sigma**2)
    )
    torch.testing.assert_close(model.noise(x, t), -sigma * gradient, **close)
    drift = sde.drift(x, t) - 0.5 * float(sde.diffusion(t)) ** 2 * gradient
    torch.testing.assert_close(model.velocity(x, t), drift, rtol=1e-8, atol=1e-8 * (1 + float(sde.diffusion(t)) ** 2))
    denoised, noise = model.predict(x, t)
    assert torch.equal(denoised, model.denoise(x, t))
    assert torch.equal(noise, model.noise(x, t))
    assert model.score(x.float(), t).dtype == torch.float32


def test_denoiser_is_the_posterior_mean(sde):
    """E[x_0 | x_t = x] by quadrature over x_0 in 1D."""
    mixture = GaussianMixture([0.3, 0.7], [[-1.0], [0.5]], [[[0.04]], [[0.25]]])
    model, t = mixture.diffuse(sde), 0.4
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    x = alpha * 0.2 + sigma * 0.5
    u = np.linspace(-6, 6, 40_001)
    weight = np.exp(scipy_log_prob(mixture, u[:, None])) * stats.norm(alpha * u, sigma).pdf(x)
    expected = integrate.trapezoid(u * weight, u) / integrate.trapezoid(weight, u)
    got = model.denoise(torch.tensor([[x]], dtype=torch.float64), t)
    assert float(got) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0])
def test_densities_integrate_to_one(sde, t):
    """In 1D and 2D, by quadrature over 9 standard deviations."""
    line = GaussianMixture([0.3, 0.7], [[-1.0], [0.5]], [[[0.04]], [[0.25]]]).diffuse(sde)
    spread = 9 * math.hypot(float(sde.sigma(t)), float(sde.alpha(t)))
    u = torch.linspace(-spread, spread, 20_001, dtype=torch.float64)
    assert float(torch.trapezoid(line.log_prob(u[:, None], t).exp(), u)) == pytest.approx(1, abs=1e-7)
    plane = GaussianMixture([0.4, 0.6], [[0.5, 0.0], [-0.5, 0.3]], [[[0.3, 0.1], [0.1, 0.2]]] * 2).diffuse(sde)
    u = torch.linspace(-spread, spread, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(u, u)
    density = plane.log_prob(grid, t).exp().reshape(401, 401)
    assert float(torch.trapezoid(torch.trapezoid(density, u), u)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["ring8", "full3", "image16"])
def test_samples_have_the_moments(name, request):
    """Mean and covariance of exact draws, and the entropy E[-log p], within five standard errors."""
    mixture, n = request.getfixturevalue(name), 20_000
    x = mixture.sample(n, seed=3)
    assert x.shape == (n, *mixture.event_shape)
    flat = x.flatten(1)
    std = mixture.covariance.diagonal().sqrt()
    assert ((flat.mean(0) - mixture.mean.flatten()).abs() < 5 * std / n**0.5).all()
    centred = flat - mixture.mean.flatten()
    products = centred[:, :, None] * centred[:, None, :]
    assert ((products.mean(0) - mixture.covariance).abs() < 5 * products.std(0) / n**0.5).all()
    # the chance of each component: which one explains a draw best is known where they do not overlap
    if name == "ring8":
        nearest = torch.cdist(flat, mixture.means).argmin(1)
        counts = torch.bincount(nearest, minlength=8).double()
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_unequal_weights_are_drawn_as_given():
    """Components appear as often as their weights say."""
    mixture = GaussianMixture.isotropic([[-5.0], [0.0], [5.0]], 0.1, weights=[0.1, 0.6, 0.3])
    x = mixture.sample(20_000, seed=0).flatten()
    counts = [(x < -2.5).sum(), ((x > -2.5) & (x < 2.5)).sum(), (x > 2.5).sum()]
    assert stats.chisquare([int(c) for c in counts], [2000, 12_000, 6000]).pvalue > 1e-4


def test_image_events_equal_flat_ones(image16, sde):
    """An event shape only reshapes."""
    flat = GaussianMixture(image16.weights, image16.means, image16.covariances)
    x = image16.sample(5, seed=0)
    assert torch.equal(x.flatten(1), flat.sample(5, seed=0))
    a, b = image16.diffuse(sde), flat.diffuse(sde)
    torch.testing.assert_close(a.log_prob(x, 0.3), b.log_prob(x.flatten(1), 0.3))
    for name in ("denoise", "score", "noise", "velocity"):
        got, expected = getattr(a, name)(x, 0.3), getattr(b, name)(x.flatten(1), 0.3)
        assert got.shape == x.shape
        torch.testing.assert_close(got.flatten(1), expected)
    assert image16.mean.shape == (1, 4, 4)
    assert a.event_shape == (1, 4, 4)


def test_time_zero_is_the_data(full3):
    """log_prob(x) and log_prob(x, 0) agree where sigma(0) = 0; the denoiser there is the identity."""
    model, x = full3.diffuse(VPSDE()), full3.sample(4, seed=0)
    torch.testing.assert_close(model.log_prob(x), full3.log_prob(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.denoise(x, 0.0), x, rtol=1e-10, atol=1e-10)


def test_far_from_all_components(ring8, sde):
    """Log densities and scores stay finite and right 1000 standard deviations out, where densities underflow."""
    model = ring8.diffuse(sde)
    x = torch.tensor([[70.0, 1.0], [0.0, -70.0]], dtype=torch.float64)
    expected = scipy_log_prob(ring8, x.numpy(), float(sde.alpha(0.01)), float(sde.sigma(0.01)))
    torch.testing.assert_close(model.log_prob(x, 0.01), torch.from_numpy(expected), rtol=1e-9, atol=0)
    assert torch.isfinite(model.score(x, 0.01)).all()
    step = expand(sde.sigma(torch.tensor([0.01, 0.01])) ** 2, x) * model.score(x, 0.01)
    assert (step.norm(dim=1) < 71).all()


def test_sigma_data_is_the_root_mean_variance(full3):
    """The scale that solvers use."""
    expected = math.sqrt(float(full3.covariance.trace()) / 3)
    assert full3.diffuse(VPSDE()).sigma_data == pytest.approx(expected, rel=1e-12)


def test_moves_to_each_device(ring8, device):
    """The exact model computes where its input lives."""
    model, x = ring8.diffuse(VPSDE()).to(device), ring8.sample(4, seed=0, device=device)
    assert x.device.type == device
    expected = ring8.diffuse(VPSDE()).score(x.cpu(), 0.3)
    torch.testing.assert_close(model.score(x, 0.3).cpu(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ring8.log_prob(x).cpu(), ring8.log_prob(x.cpu()), rtol=1e-9, atol=1e-9)


EYE = np.eye(2)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "words"),
    [
        ([1.0], [0.0, 1.0], [EYE], r"\(K, d\)"),
        ([0.5, 0.5], [[0.0, 1.0]], [EYE], r"\(2,\).*\(1,\)"),
        ([1.0], [[0.0, 1.0]], [np.eye(3)], r"\(1, 3, 3\).*\(1, 2, 2\)"),
        ([0.5, 0.4], [[0.0, 1.0]] * 2, [EYE] * 2, "sum to 1"),
        ([1.5, -0.5], [[0.0, 1.0]] * 2, [EYE] * 2, "positive"),
        ([1.0], [[0.0, 1.0]], [[[1.0, 0.5], [0.0, 1.0]]], "symmetric"),
        ([1.0], [[0.0, 1.0]], [[[1.0, 2.0], [2.0, 1.0]]], "positive definite"),
        ([1.0], [[0.0, 1.0]], [0 * EYE], "positive definite"),
        ([1.0], [[float("nan"), 1.0]], [EYE], "NaN"),
        ([1.0], [[0.0, 1.0]], [EYE * float("nan")], "NaN"),
        ([], np.zeros((0, 2)), np.zeros((0, 2, 2)), r"\(K, d\)"),
    ],
)
def test_bad_mixtures(weights, means, covariances, words):
    """Shapes, weights and covariances are checked at construction."""
    with pytest.raises(ValueError, match=words):
        GaussianMixture(weights, means, covariances)


def test_bad_arguments(ring8):
    """Negative sizes, standard deviations that are none, wrong event shapes, conditions."""
    for std in (0.0, -0.2, float("nan")):
        with pytest.raises(ValueError):
            GaussianMixture.isotropic([[0.0, 1.0]], std)
    with pytest.raises(ValueError, match="event_shape"):
        GaussianMixture.isotropic([[0.0, 1.0]], 1.0, event_shape=(3,))
    for n in (-1, 2.5, True):
        with pytest.raises(ValueError, match="n must be"):
            ring8.sample(n)
    assert ring8.sample(0, seed=0).shape == (0, 2)
    model = ring8.diffuse(VPSDE())
    for call in (model.log_prob, model.score, model.denoise):
        with pytest.raises(ValueError, match=r"\(B, 2\).*\(4, 3\)"):
            call(torch.zeros(4, 3), 0.5)
    with pytest.raises(ValueError, match="no condition"):
        model.denoise(torch.zeros(4, 2), 0.5, cond=torch.zeros(4))
    with pytest.raises(TypeError, match="floating"):
        ring8.log_prob(torch.zeros(4, 2, dtype=torch.int64))
