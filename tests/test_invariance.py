"""Where the data's mean is, and how their axes lie, makes no difference to how accurate a method is."""

import functools
import math

import pytest
import torch

from scoresde import METHODS, VESDE, VPSDE, GaussianMixture, ScoreModel, sample
from scoresde.samplers import ProbabilityFlow

DETERMINISTIC = [name for name, make in METHODS.items() if not make().stochastic]
ADAPTIVE = [name for name in DETERMINISTIC if METHODS[name]().adaptive]
WORSE = 1.2  # the factor by which an error may grow


class Unknown(ScoreModel):
    """A mixture that does not say where its mean is."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sde, self.sigma_data, self.event_shape = model, model.sde, model.sigma_data, model.event_shape

    def denoise(self, x, t, cond=None):
        return self.model.denoise(x, t)


class Counting(Unknown):
    """The same, with the number of its evaluations; it says what the other model does of its mean."""

    def __init__(self, model):
        super().__init__(model)
        self.data_mean = model.data_mean
        self.calls = 0

    def denoise(self, x, t, cond=None):
        self.calls += 1
        return self.model.denoise(x, t)


def skewed(shift, turn=0.0):
    """Five narrow Gaussians without symmetry around (0, 0), turned, then moved by `shift` in both coordinates."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.3, 1.1], [-0.8, -0.4], [-0.5, -0.9]], dtype=torch.float64)
    c, s = math.cos(turn), math.sin(turn)
    rotation = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return GaussianMixture.isotropic((points - points.mean(0)) @ rotation.T + shift, 0.1), rotation


@functools.cache
def problem(sde, shift, turn):
    """(model, starts, their exact ends): all of them move and turn with the data."""
    mixture, rotation = skewed(shift, turn)
    model = mixture.diffuse(sde)
    x = sde.prior_std * torch.randn(128, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x @ rotation.T + float(sde.alpha(sde.t_max)) * shift
    exact = sample(model, x.shape, method=ProbabilityFlow(1e-9, 1e-9), x_init=x, grid=[sde.t_max, sde.t_min])
    return model, x, exact


def error(method, sde, shift, turn=0.0, known=True):
    """Root mean square distance from the exact ends."""
    model, x, exact = problem(sde, shift, turn)
    ends = [sde.t_max, sde.t_min]
    options = dict(grid=ends) if method in ADAPTIVE else dict(steps=10)
    got = sample(model if known else Unknown(model), x.shape, method=method, x_init=x, denoise_final=False, **options)
    return float((got - exact).square().mean().sqrt())


@pytest.mark.parametrize("known", [True, False], ids=["mean known", "unknown"])
@pytest.mark.parametrize("sde", [VPSDE(t_min=1e-3), VESDE()], ids=["VP", "VE"])
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_the_mean_of_the_data(method, sde, known):
    """Data moved by 0.5, 1 and 2: the error of ten steps, and of adaptive solves, stays within 1.2 times.

    But for the solvers of other libraries on a model that does not know its mean: their tolerances of 1e-5, as published, are
    relative to x itself, and the error stays below twenty times that.
    """
    limit = WORSE * error(method, sde, 0.0, known=known)
    if method in ("torchdiffeq", "rk45") and not known:
        limit = 20 * METHODS[method]().rtol
    for shift in (0.5, 1.0, 2.0):
        assert error(method, sde, shift, known=known) < limit


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_the_axes_of_the_data(method):
    """Data turned by 25 degrees. The tolerances of adaptive methods belong to coordinates, so their small errors may double."""
    sde = VPSDE(t_min=1e-3)
    assert error(method, sde, 0.0, 0.44) < (2.0 if method in ADAPTIVE else WORSE) * error(method, sde, 0.0)


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
def test_a_mean_that_is_not_known_costs_no_evaluation_more(steps):
    """auto makes exactly `steps` evaluations either way, and for Gaussian data each finds the exact end."""
    sde = VPSDE(t_min=1e-3)
    gaussian = GaussianMixture.isotropic([[3.0, -1.0]], 0.4).diffuse(sde)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = sample(gaussian, x.shape, method=ProbabilityFlow(1e-10, 1e-10), x_init=x, grid=[1.0, 1e-3])
    for model in (gaussian, Unknown(gaussian)):
        counting = Counting(model)
        got = sample(counting, x.shape, method="auto", steps=steps, x_init=x)
        assert counting.calls == steps
        torch.testing.assert_close(got, exact, rtol=1e-7, atol=1e-8)


def test_an_earlier_start_follows_the_mean():
    """Gaussian data away from zero, from t_max = 0.3: the samples are the data's, and their log densities the closed form's."""
    sde = VPSDE(t_min=1e-3)
    mixture = GaussianMixture.isotropic([[3.0, -1.0]], 0.4)
    x, values = sample(mixture.diffuse(sde), (2000, 2), method="ode", t_max=0.3, seed=0, return_log_prob=True)
    standard = (x - mixture.mean) / 0.4
    assert float(standard.mean(0).abs().max()) < 4 / math.sqrt(2000)
    assert float((standard.std(0) - 1).abs().max()) < 0.07
    torch.testing.assert_close(values, mixture.diffuse(sde).log_prob(x, sde.t_min), rtol=1e-3, atol=1e-3)
