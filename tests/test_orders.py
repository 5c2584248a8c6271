"""Orders of convergence: every deterministic method on every process, by the slope of the error in float64."""

import functools
import math

import pytest
import torch

from scoresde import METHODS, VPSDE, GaussianMixture
from scoresde.rng import RandomSource
from scoresde.samplers import DDIM, EulerMaruyama, Multistep, ProbabilityFlow, State, run

SAMPLERS = {name: make() for name, make in METHODS.items()}
SAMPLERS |= {
    "euler, eta = 0": EulerMaruyama(eta=0.0),
    "ddim, eta = 0": DDIM(0.0),
    "adams-angle-2": Multistep("angle", 2),
    "adams-noise-2": Multistep("noise", 2),
    "adams-noise-4": Multistep("noise", 4),
    "adams-moulton": Multistep("noise", 2, corrector=3),
    "deis-1": Multistep("noise", 2, variable="time"),
    "lms-2": Multistep("noise", 2, variable="ratio"),
    "angle in theta": Multistep("angle", 3, variable="angle"),
    "2m exact": Multistep("data", 2),
}
DETERMINISTIC = {name: s for name, s in SAMPLERS.items() if s.convergence_order is not None}
HIGH, LOW = (
    1.5,
    0.15,
)  # sigma/alpha between which the slopes are taken: the middle of the path, where nothing is trivial


@pytest.fixture(scope="module")
def clover():
    """Three wide Gaussians off the centre: smooth enough that 96 steps are in the asymptotic regime."""
    a = 2 * math.pi * torch.arange(3, dtype=torch.float64) / 3
    return GaussianMixture.isotropic(torch.stack([a.cos(), a.sin()], 1) + 0.3, 0.3)


@functools.cache
def problem(sde, mixture):
    """(model, t, s, states at t, their exact ends at s)."""
    t, s = (float(sde.time(-2 * math.log(r))) for r in (HIGH, LOW))
    model = mixture.diffuse(sde)
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sde.perturb(mixture.sample(16, seed=1), t, noise)
    return model, t, s, x, ProbabilityFlow(1e-12, 1e-12).step(model, x, t, s, State(), RandomSource(0, "cpu", 16))


def slope(sampler, sde, mixture, spaced, steps=(80, 160)):
    """log2 of the ratio of the mean errors at twice as many steps, on a grid even in log-SNR or in t."""
    model, t, s, x, exact = problem(sde, mixture)
    errors = []
    for n in steps:
        if spaced == "time":
            times = torch.linspace(t, s, n + 1, dtype=torch.float64)
        else:
            times = sde.time(-2 * torch.linspace(math.log(HIGH), math.log(LOW), n + 1, dtype=torch.float64))
            times[0], times[-1] = t, s
        y = run(sampler, model, x, times, RandomSource(0, "cpu", 16), denoise_final=False)
        errors.append(float((y - exact).abs().mean()))
    return math.log2(errors[0] / errors[1])


def test_the_table_holds_every_deterministic_method():
    """A new method cannot be left out: whatever is not in the table is stochastic or adaptive."""
    stochastic = {"pc", "euler", "reverse-diffusion", "ancestral", "langevin", "edm", "sde-dpm++2m", "sde-dpm++3m"}
    stochastic |= {"sa-solver", "er-sde", "sde"}
    assert set(METHODS) - set(DETERMINISTIC) <= stochastic | {"ode", "torchdiffeq", "rk45", "auto"}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order(name, sde, clover):
    """On a grid even in log-SNR the slope is `convergence_order` within 0.2."""
    sampler = DETERMINISTIC[name]
    assert slope(sampler, sde, clover, "log-snr") == pytest.approx(sampler.convergence_order, abs=0.2)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_on_an_uneven_grid(name, sde, clover):
    """On a grid even in t (steps in log-SNR that differ by a factor of up to nine) it is that at least.

    More is possible: the first step is short there, so that the error of its lower order does not show.
    """
    sampler = DETERMINISTIC[name]
    assert slope(sampler, sde, clover, "time") > sampler.convergence_order - 0.2


def test_what_the_redone_first_step_is_for(clover):
    """Third-order steps after a first step of first order are second order in all: the published start of the 3M family."""

    class Published(Multistep):
        def _corrector_nodes(self, step):
            return 0

    assert slope(Published("data", 3), VPSDE(), clover, "log-snr") < 2.3
    assert slope(Multistep("data", 3), VPSDE(), clover, "log-snr") > 2.8
