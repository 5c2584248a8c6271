"""Samplers that stand on torchsde, torchdiffeq and SciPy, against exact mixtures and the package's own solver."""

import math
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    GaussianMixture,
    NonFiniteError,
    RectifiedFlow,
    ScoreNet,
    SubVPSDE,
    sample,
)
from scoresde.rng import RandomSource
from scoresde.samplers import ProbabilityFlow, State, Trajectory
from scoresde.samplers import backends as backends_module
from scoresde.samplers.backends import ADAPTIVE, EXPLICIT, FIXED, SCHEMES, ScipyRK45, TorchDiffEq, TorchSDE

PROCESSES = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), RectifiedFlow()]
THREE = GaussianMixture.isotropic([[1.0, 0.5], [-1.0, -0.3], [0.2, -1.0]], 0.3)
IMAGE = GaussianMixture.isotropic([[0.5, -0.5, 0.2, 0.0], [-0.4, 0.6, 0.0, 0.1]], 0.3, event_shape=(1, 2, 2))
BLOB = GaussianMixture.isotropic([[0.3, -0.2]], 0.5)  # a linear drift: no basins that rounding could swap


def start(model, n, seed=0):
    """A float64 draw from the prior."""
    return model.sde.prior_sample((n, *model.event_shape), seed, dtype=torch.float64)


def named(process):
    return type(process).__name__


# -- the probability flow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [THREE, IMAGE], ids=["2d", "image"])
@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("method", [TorchDiffEq(rtol=1e-6, atol=1e-6), ScipyRK45(rtol=1e-6, atol=1e-6)], ids=named)
def test_flow_ends_where_our_own_does(mixture, process, method):
    """Endpoints against ProbabilityFlow at 1e-9."""
    model = mixture.diffuse(process)
    x = start(model, 16)
    exact = sample(model, x.shape, method=ProbabilityFlow(1e-9, 1e-9), x_init=x)
    torch.testing.assert_close(sample(model, x.shape, method=method, x_init=x), exact, atol=3e-4, rtol=0)
    assert 20 < method.nfe < 500


@pytest.mark.parametrize("name", [*ADAPTIVE, *FIXED])
def test_every_method_of_torchdiffeq(name):
    """Each one converges, the first-order ones roughly."""
    model = BLOB.diffuse(VPSDE())
    x = start(model, 8)
    exact = sample(model, x.shape, method=ProbabilityFlow(1e-9, 1e-9), x_init=x)
    tolerance = 0.05 if name == "euler" else 5e-3
    method = TorchDiffEq(name, rtol=1e-6, atol=1e-6) if name != "fehlberg2" else TorchDiffEq(name)
    torch.testing.assert_close(sample(model, x.shape, method=method, x_init=x), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", EXPLICIT)
def test_every_method_of_scipy(name):
    model = BLOB.diffuse(VPSDE())
    x = start(model, 8)
    exact = sample(model, x.shape, method=ProbabilityFlow(1e-9, 1e-9), x_init=x)
    got = sample(model, x.shape, method=ScipyRK45(method=name), x_init=x)
    torch.testing.assert_close(got, exact, atol=1e-3, rtol=0)


class Recorder(nn.Module):
    """A network that is 0.3 x in float32 and keeps the times it saw; `bad` makes NaN below a time."""

    def __init__(self, bad=-1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.bad, self.times = bad, []

    def forward(self, x, t):
        self.times.append(float(t[0]))
        out = self.weight * x
        return torch.where(t[:, None] < self.bad, math.nan, out)


OVERSHOOTING = [TorchDiffEq(), TorchDiffEq("dopri8"), TorchDiffEq("rk4"), ScipyRK45(), TorchSDE("heun")]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", OVERSHOOTING, ids=named)
def test_the_network_sees_no_time_outside_the_schedule(method, steps):
    """Solvers that overshoot their last step are kept from it; in float32 as well."""
    net = Recorder()
    sde = VPSDE()
    x = sample(ScoreNet(net, sde), (4, 2), method=method, steps=steps, seed=0)
    assert x.dtype == torch.float32
    assert min(net.times) >= sde.t_min * (1 - 1e-6)
    assert max(net.times) <= 1.0
    if method.denoise_final:
        assert method.nfe == len(net.times) - 1
    else:
        assert method.nfe == len(net.times)


# -- the reverse SDE -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_seed_is_one_path_however_many_steps(scheme):
    """Endpoints at N, 2N, 4N, 8N steps approach one another with strong order about 1 (the noise is additive)."""
    model = BLOB.diffuse(VPSDE(t_min=0.02))
    x = start(model, 32)
    ends = [
        sample(model, x.shape, method=TorchSDE(scheme), steps=n, seed=5, x_init=x, denoise_final=False)
        for n in (25, 50, 100, 200)
    ]
    gaps = [float((b - a).pow(2).mean().sqrt()) for a, b in pairwise(ends)]
    order = math.log2(gaps[0] / gaps[2]) / 2
    assert 0.75 < order < 2.3, gaps
    assert gaps[-1] < (0.01 if scheme == "srk" else 0.05), gaps


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_law_of_samples(process):
    """Mean and covariance of the mixture, within the Monte Carlo error and the bias of 200 steps."""
    model = THREE.diffuse(process)
    x = sample(model, (2000, 2), method=TorchSDE("heun"), steps=200, seed=1).double()
    torch.testing.assert_close(x.mean(0), THREE.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), THREE.covariance, atol=0.1, rtol=0)


@pytest.mark.parametrize("scheme", ["euler", "srk", "log_ode"])
def test_a_sample_depends_on_its_seed_alone(scheme):
    """Reproducible; and one seed per sample gives the same sample in any batch, for images too."""
    model = IMAGE.diffuse(VPSDE())
    method = TorchSDE(scheme)
    draw = lambda n, seed: sample(model, (n, 1, 2, 2), method=method, steps=20, seed=seed)  # noqa: E731
    assert torch.equal(draw(3, 7), draw(3, 7))
    assert not torch.equal(draw(3, 7), draw(3, 8))
    whole = draw(4, [1, 2, 3, 4])
    torch.testing.assert_close(draw(2, [3, 1]), whole[[2, 0]], atol=1e-5, rtol=1e-5)


def test_adaptive_steps_follow_the_same_path():
    """torchsde's own step sizes end near the fine fixed grid of the same seed."""
    model = BLOB.diffuse(VPSDE(t_min=0.02))
    x = start(model, 16)
    fine = sample(model, x.shape, method=TorchSDE("heun"), steps=500, seed=5, x_init=x)
    method = TorchSDE("heun", adaptive=True, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(sample(model, x.shape, method=method, seed=5, x_init=x), fine, atol=0.05, rtol=0)
    assert method.nfe > 30


@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluations_are_counted(scheme):
    """`nfe_per_step` is what a step costs, and the first look at shapes is not paid for twice."""
    method = TorchSDE(scheme)
    sample(BLOB.diffuse(VPSDE()), (2, 2), method=method, steps=10, seed=0)
    assert method.nfe == 10 * method.nfe_per_step


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    sample(BLOB.diffuse(VPSDE()), (2, 2), method=TorchSDE(), steps=3, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- all -------------------------------------------------------------------------------------------------------------

ALL = [
    TorchSDE(),
    TorchSDE("heun"),
    TorchSDE(adaptive=True, rtol=0.05, atol=0.05),
    TorchDiffEq(),
    TorchDiffEq("rk4"),
    ScipyRK45(),
]


@pytest.mark.parametrize("method", ALL, ids=named)
def test_a_network_that_returns_nan_is_named_at_once(method):
    """Adaptive solvers would halve their steps for ever."""
    begin = time.perf_counter()
    with pytest.raises(NonFiniteError, match=r"t = 0\.\d+"):
        sample(ScoreNet(Recorder(bad=0.5), VPSDE()), (3, 2), method=method, steps=4, seed=0)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("method", ALL, ids=named)
def test_one_step_an_empty_batch_and_trajectories(method):
    """Edges of the interface."""
    model = THREE.diffuse(VPSDE())
    assert bool(torch.isfinite(sample(model, (3, 2), method=method, steps=1, seed=0)).all())
    assert sample(model, (0, 2), method=method, steps=1).shape == (0, 2)
    seen = Trajectory()
    end = sample(model, (3, 2), method=method, steps=2, seed=0, trajectory=seen, denoise_final=False)
    assert len(seen.times) == 3
    assert torch.equal(seen.states[-1], end)
    x = start(model, 3)
    step = method.step(model, x, 0.9, 0.8, State(), RandomSource(0, "cpu", 3))  # without the loop
    assert step.shape == x.shape
    assert bool(torch.isfinite(step).all())


def test_unknown_schemes_and_tolerances():
    """What is there is listed."""
    with pytest.raises(ValueError, match="euler_heun"):
        TorchSDE("rk4")
    with pytest.raises(ValueError, match="dopri5"):
        TorchDiffEq("tsit5")
    with pytest.raises(ValueError, match="DOP853"):
        ScipyRK45(method="LSODA")
    for make in (TorchSDE, TorchDiffEq, ScipyRK45):
        with pytest.raises(ValueError, match="rtol"):
            make(rtol=0.0)


@pytest.mark.parametrize("make", [TorchSDE, TorchDiffEq, ScipyRK45])
def test_a_missing_library_is_named(make, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(backends_module.importlib, "import_module", absent)
    with pytest.raises(ImportError, match="pip install"):
        make()


def test_a_solve_that_does_not_arrive_says_so():
    """torchdiffeq's assertion becomes an error for people."""
    model = THREE.diffuse(VPSDE())
    with pytest.raises(RuntimeError, match="did not get from"):
        sample(model, (3, 2), method=TorchDiffEq(options={"max_num_steps": 3}), seed=0)
