"""Samples with their log densities from one solve."""

import math

import pytest
import torch

from scoresde import VESDE, VPSDE, GaussianMixture, Hutchinson, log_prob, sample, sample_with_log_prob
from scoresde.ode import MAX_NFE
from scoresde.rng import RandomSource
from scoresde.samplers import ProbabilityFlow


@pytest.fixture
def model(full3):
    return full3.diffuse(VPSDE(t_min=1e-3))


@pytest.mark.parametrize("sde", [VPSDE(t_min=1e-3), VESDE()], ids=lambda s: type(s).__name__)
def test_values_are_the_model_s(full3, sde):
    """The log density is the closed form's at the sample, and log_prob's; the latent is where the flow began."""
    model = full3.diffuse(sde)
    x, result = sample_with_log_prob(model, (6, 3), seed=0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.value, model.log_prob(x.double(), sde.t_min), rtol=0, atol=2e-3)
    torch.testing.assert_close(result.value, log_prob(model, x, seed=1).value, rtol=0, atol=2e-3)
    assert torch.equal(result.latent, sde.prior_std * RandomSource(0, "cpu", 6).normal((6, 3), torch.float32))
    assert (result.status == 0).all()
    assert (result.nfe > 10).all()
    assert torch.equal(result.stderr, torch.zeros(6, dtype=torch.float64))


def test_the_argument_of_sample_calls_it(model):
    """return_log_prob=True is the same solve with the sampler's tolerances, values alone."""
    flow = ProbabilityFlow(1e-5, 1e-6)
    x, value = sample(model, (5, 3), method=flow, seed=3, return_log_prob=True)
    y, result = sample_with_log_prob(model, (5, 3), seed=3, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, y)
    assert torch.equal(value, result.value)
    assert flow.nfe == float(result.nfe.double().mean())


def test_an_earlier_start_and_a_given_one(model):
    """From t_max the density is the Gaussian's there; from x_init at the prior's end the model's own."""
    x, result = sample_with_log_prob(model, (4, 3), seed=0, t_max=0.5, rtol=1e-6, atol=1e-6)
    std = math.hypot(float(model.sde.alpha(0.5)) * model.sigma_data, float(model.sde.sigma(0.5)))
    mean = float(model.sde.alpha(0.5)) * model.data_mean
    drawn = std * RandomSource(0, "cpu", 4).normal((4, 3), torch.float32)
    torch.testing.assert_close(result.latent, drawn + mean.float())
    z = (result.latent.double() - mean) / std
    start = -0.5 * (z**2).sum(1) - 3 * (0.5 * math.log(2 * math.pi) + math.log(std))
    back = log_prob(model, x, rtol=1e-7, atol=1e-7, seed=0).value
    ahead = model.log_prob(result.latent.double(), 0.5)
    torch.testing.assert_close(result.value - start, back - ahead, rtol=0, atol=5e-3)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, given = sample_with_log_prob(model, (4, 3), x_init=z, seed=0)
    assert y.dtype == torch.float64
    assert torch.equal(given.latent, z)
    with pytest.raises(ValueError, match=r"x_init at t = 0\.5 is not known"):
        sample_with_log_prob(model, (4, 3), x_init=z, t_max=0.5)


def test_failures_are_a_status(model):
    """Examples that do not finish are NaN with a status here, and an error from `sample`."""
    _, result = sample_with_log_prob(model, (3, 3), seed=0, max_nfe=15)
    assert (result.status == MAX_NFE).all()
    assert result.value.isnan().all()
    with pytest.raises(RuntimeError, match=r"rows \[0, 1, 2\].*max_nfe"):
        sample(model, (3, 3), method=ProbabilityFlow(max_nfe=15), seed=0, return_log_prob=True)


def test_estimated_traces_and_bad_options(model):
    """A trace of its own choice; options of the wrong kind are refused as `log_prob` and `sample` do."""
    _, result = sample_with_log_prob(model, (3, 3), seed=0, divergence=Hutchinson(8))
    assert (result.stderr > 0).all()
    for options, error, message in (
        (dict(divergence="exact"), TypeError, "divergence must be"),
        (dict(rtol=0), ValueError, "rtol must be"),
        (dict(method="rk4"), ValueError, "unknown Runge-Kutta method"),
        (dict(grid=[1.0, 0.5]), ValueError, r"grid ends at t = 0\.5"),
        (dict(steps=10**9), ValueError, "at most"),
        (dict(cond=torch.zeros(2, 1)), ValueError, "one row per example"),
    ):
        with pytest.raises(error, match=message):
            sample_with_log_prob(model, (3, 3), **options)
    with pytest.raises(TypeError, match="ScoreModel"):
        sample_with_log_prob(None, (3, 3))
    with pytest.raises(ValueError, match="made for examples"):
        sample_with_log_prob(model, (3, 2))
    empty, result = sample_with_log_prob(GaussianMixture.isotropic([[0.0]], 1.0).diffuse(VPSDE()), (0, 1))
    assert empty.shape == (0, 1)
    assert result.value.shape == (0,)
