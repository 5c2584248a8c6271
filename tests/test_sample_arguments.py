"""Arguments of `sample`: budgets, starts, grids, seeds, faulty networks, and models bound to a solve against free ones."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from scoresde import (
    EDMSDE,
    METHODS,
    VESDE,
    VPSDE,
    GaussianMixture,
    NonFiniteError,
    RectifiedFlow,
    ScoreModel,
    ScoreNet,
    sample,
)
from scoresde.grids import angle, cosine, given, karras, uniform_log_snr, uniform_time
from scoresde.models.network import PARAMETERIZATIONS
from scoresde.rng import RandomSource
from scoresde.samplers import (
    Data,
    Hold,
    PredictorCorrector,
    ProbabilityFlow,
    Sampler,
    Singlestep,
    Tau,
    TorchSDE,
    Trajectory,
    run,
    time_grid,
)

FIXED = [name for name, make in METHODS.items() if make().nfe_per_step]
ADAPTIVE = [name for name in METHODS if name not in FIXED]
GRIDS = {
    "uniform_time": uniform_time,
    "uniform_log_snr": uniform_log_snr,
    "karras": karras,
    "angle": angle,
    "cosine": cosine,
}


class Bend(nn.Module):
    """A small elementwise network of x and the label, its parameters in any dtype; counts its calls."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.8, 0.3, 0.2], dtype=dtype))
        self.calls = 0

    def forward(self, x, label):
        self.calls += 1
        a, b, c = self.weight
        return a * torch.tanh(x) + b * x + c * torch.cos(label).to(x.dtype)[:, None]


# -- nfe -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [True, False, None])
@pytest.mark.parametrize("method", FIXED)
def test_nfe_is_exact(method, final):
    """A budget is met to the evaluation or refused, naming budgets that are met."""
    net = Bend()
    model = ScoreNet(net, VPSDE())
    for nfe in (1, 7, 12, 13):
        net.calls = 0
        try:
            sample(model, (1, 2), method=method, nfe=nfe, seed=0, denoise_final=final)
        except ValueError as e:
            assert net.calls == 0
            each = METHODS[method]().nfe_per_step
            named = re.search(r"nfe = (\d+) cannot be met exactly; ask for (\d+)(?: or (\d+))?", str(e))
            assert int(named[1]) == nfe
            fitting = [int(n) for n in named.groups()[1:] if n]
            assert min(abs(n - nfe) for n in fitting) <= each
            for n in fitting:
                net.calls = 0
                sample(model, (1, 2), method=method, nfe=n, seed=0, denoise_final=final)
                assert net.calls == n
        else:
            assert net.calls == nfe


def test_which_budgets_fit_heun():
    """2 a step: odd ones with the final denoiser, even ones without; the message says both."""
    model = ScoreNet(Bend(), VPSDE())
    with pytest.raises(ValueError, match=r"Heun costs 2 evaluations a step.*nfe = 8 .*7 or 9, or pass denoise_final=F"):
        sample(model, (1, 2), method="heun", nfe=8)
    with pytest.raises(ValueError, match=r"Heun costs 2 evaluations a step, so nfe = 9 .*8 or 10\.$"):
        sample(model, (1, 2), method="heun", nfe=9, denoise_final=False)
    with pytest.raises(ValueError, match=r"nfe = 1 cannot .* ask for 3"):
        sample(model, (1, 2), method="heun", nfe=1)
    a, b = (sample(model, (2, 2), method="heun", seed=0, **kw) for kw in (dict(nfe=9), dict(steps=4)))
    assert torch.equal(a, b)


def test_nfe_goes_alone():
    """Not with steps, not with a grid of other length, not for adaptive methods, and only as an integer from 1 on."""
    model = ScoreNet(Bend(), VPSDE())
    with pytest.raises(ValueError, match=r"steps or nfe, not both; got steps=5 and nfe=10"):
        sample(model, (1, 2), method="ddim", steps=5, nfe=10)
    with pytest.raises(ValueError, match="makes no network evaluations"):
        sample(model, (1, 2), method=Hold(), nfe=10)
    for method in ADAPTIVE:
        with pytest.raises(ValueError, match="chooses its own number of network evaluations"):
            sample(model, (1, 2), method=method, nfe=10)
    with pytest.raises(ValueError, match="nfe must be at least 1"):
        sample(model, (1, 2), method="ddim", nfe=0)
    for nfe in (2.0, True, "5"):
        with pytest.raises(TypeError, match="nfe must be an integer"):
            sample(model, (1, 2), method="ddim", nfe=nfe)
    with pytest.raises(ValueError, match="leave out nfe"):
        sample(model, (1, 2), method="ddim", nfe=5, grid=[1.0, 0.5, 0.1])


# -- t_max -----------------------------------------------------------------------------------------------------------


SOME = pytest.mark.parametrize("sde", [EDMSDE(), RectifiedFlow()], ids=lambda s: type(s).__name__)


@SOME
@pytest.mark.parametrize("method", METHODS)
def test_an_earlier_start(method, sde):
    """The grid begins at t_max, from a draw of standard deviation sqrt(alpha^2 c^2 + sigma^2)."""
    model = ScoreNet(Bend(), sde, "edm", sigma_data=0.4)
    record, t = Trajectory(), 0.7
    x = sample(model, (3, 2), method=method, steps=3, t_max=t, seed=4, trajectory=record)
    assert torch.isfinite(x).all()
    assert (record.times[0], record.times[-1]) == (t, sde.t_min)
    scale = math.hypot(0.4 * float(sde.alpha(t)), float(sde.sigma(t)))
    expected = scale * RandomSource(4, "cpu", 3).normal((3, 2), torch.float32)
    torch.testing.assert_close(record.states[0], expected)
    start = torch.ones(3, 2)
    record = Trajectory()
    sample(model, (3, 2), method=method, steps=3, t_max=t, seed=4, x_init=start, trajectory=record)
    assert torch.equal(record.states[0], start)


@SOME
@pytest.mark.parametrize("method", [m for m in METHODS if m != "auto"])
def test_t_max_out_of_range(method, sde):
    """It has to lie in (t_min, t_max] of the process."""
    model = ScoreNet(Bend(), sde, "edm")
    for t in (sde.t_min, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"t_max must lie in"):
            sample(model, (1, 2), method=method, steps=3, t_max=t)


def test_t_max_of_the_few_step_rule(sde):
    """The same for method="auto"."""
    model = ScoreNet(Bend(), sde, "edm")
    for t in (sde.t_min, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"t_max must lie in"):
            sample(model, (1, 2), method="auto", steps=3, t_max=t)


def test_t_max_with_a_grid():
    """A grid function takes it; given times already say where they begin."""
    model, sde = ScoreNet(Bend(), VPSDE()), VPSDE()
    for grid in GRIDS.values():
        record = Trajectory()
        sample(model, (1, 2), method="ddim", steps=4, grid=grid, t_max=0.5, seed=0, trajectory=record)
        assert record.times[:5] == grid(sde, 4, t_max=0.5).tolist()
        assert record.times[0] == 0.5
    for times in ([0.5, 0.1], torch.tensor([0.5, 0.1]), given([0.5, 0.1])):
        with pytest.raises(ValueError, match="t_max does not go with given times"):
            sample(model, (1, 2), method="ddim", steps=1, grid=times, t_max=0.5)
    with pytest.raises(ValueError, match=r"pass x_init.*or t_max"):
        sample(model, (1, 2), method="ddim", grid=[0.5, 0.1])


# -- grids -----------------------------------------------------------------------------------------------------------


def ratio(sde, t):
    """sigma/alpha in float64."""
    return torch.exp(-0.5 * sde.log_snr(t))


COORDINATES = {
    "uniform_time": lambda sde, t: t,
    "uniform_log_snr": lambda sde, t: sde.log_snr(t),
    "karras": lambda sde, t: ratio(sde, t) ** (1 / 7),
    "angle": lambda sde, t: torch.atan(ratio(sde, t)),
    "cosine": lambda sde, t: torch.acos((1 - (t - sde.t_min) / (sde.t_max - sde.t_min)).clamp(-1, 1)),
}


@pytest.mark.parametrize("t_max", [None, 0.6])
@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_even_in_their_coordinate(name, t_max, sde):
    """Strictly decreasing with exact ends, equal gaps in between, for any number of steps."""
    for steps in (1, 2, 17, 300):
        t = GRIDS[name](sde, steps, t_max=t_max)
        assert t.shape == (steps + 1,)
        assert t.dtype == torch.float64
        assert (float(t[0]), float(t[-1])) == (sde.t_max if t_max is None else t_max, sde.t_min)
        assert (t[1:] < t[:-1]).all()
    shifted = VPSDE() if t_max is None else sde
    if name != "cosine" or t_max is None:
        on = shifted if name == "cosine" else sde
        gaps = torch.diff(COORDINATES[name](on, GRIDS[name](on, 20, t_max=t_max)))
        torch.testing.assert_close(gaps, gaps.mean().expand(20), rtol=1e-5, atol=1e-8)


def test_the_formula_of_the_cosine_grid():
    """t_min + (t_max - t_min)(1 - cos(pi u / 2)): half of u = 1/2 is at 1 - cos(pi/4), and it starts slowly at t_min."""
    t = cosine(VPSDE(t_min=0.0), 2)
    assert t.tolist() == pytest.approx([1.0, 1 - math.sqrt(0.5), 0.0])
    t = cosine(VPSDE(t_min=0.01), 3, t_max=0.8)
    assert t.tolist() == pytest.approx([0.8, 0.01 + 0.79 * 0.5, 0.01 + 0.79 * (1 - math.cos(math.pi / 6)), 0.01])


def test_the_scale_of_the_angle_grid():
    """arctan(sigma / (alpha scale)) is even: on VP with scale 1, alpha = cos and sigma = sin of equal angles."""
    sde = VPSDE()
    t = angle(sde, 10)
    theta = torch.linspace(*torch.atan2(sde.sigma(t[[0, -1]]), sde.alpha(t[[0, -1]])).tolist(), 11, dtype=torch.float64)
    torch.testing.assert_close(sde.alpha(t), torch.cos(theta), rtol=1e-7, atol=1e-9)
    gaps = torch.diff(torch.atan(ratio(sde, angle(sde, 10, 0.3)) / 0.3))
    torch.testing.assert_close(gaps, gaps.mean().expand(10), rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="scale"):
        angle(sde, 5, 0.0)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_to_sigma_zero(name):
    """With t_min = 0 on VP the last step is the one to it, the grid proper ends at sigma/alpha = 0.002."""
    sde = VPSDE(t_min=0.0)
    for steps in (1, 2, 30):
        t = GRIDS[name](sde, steps)
        assert t.shape == (steps + 1,)
        assert (float(t[0]), float(t[-1])) == (1.0, 0.0)
        assert (t[1:] < t[:-1]).all()
    if name not in ("uniform_time", "cosine"):
        assert float(ratio(sde, t[-2])) == pytest.approx(0.002, rel=1e-6)
        gaps = torch.diff(COORDINATES[name](sde, t[:-1]))
        torch.testing.assert_close(gaps, gaps.mean().expand(29), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(
    "method", ["pc", "edm", "sa-solver", "er-sde", "auto", "heun", "dpm3", "unipc3", "deis", "ipndm"]
)
def test_methods_end_at_sigma_zero_on_every_grid(method, grid):
    """Finite results at t_min = 0 of VP, where log-SNR is infinite, whatever the grid."""
    model = ScoreNet(Bend(), VPSDE(t_min=0.0), "denoise")
    for steps in (1, 4):
        x = sample(model, (4, 2), method=method, steps=steps, grid=grid, seed=0, denoise_final=False)
        assert torch.isfinite(x).all()


def test_grids_that_do_not_decrease():
    """Refused whether they come as times or from a function."""
    model = ScoreNet(Bend(), VPSDE())
    for times in ([1.0, 0.5, 0.6], [0.1, 1.0], [1.0, 1.0], [1.0], [1.0, math.nan], [1.0, -0.1]):
        with pytest.raises(ValueError, match="decrease strictly"):
            sample(model, (1, 2), method="ddim", grid=times)
    with pytest.raises(ValueError, match="does not decrease strictly"):
        sample(model, (1, 2), method="ddim", steps=2, grid=lambda sde, n: torch.tensor([1.0, 0.1, 0.5]))


@SOME
@pytest.mark.parametrize("method", METHODS)
def test_one_step(method, sde):
    """steps = 1 gives finite samples of a network, from every process."""
    x = sample(ScoreNet(Bend(), sde, "edm"), (4, 2), method=method, steps=1, seed=0)
    assert torch.isfinite(x).all()


# -- networks and seeds that are wrong -------------------------------------------------------------------------------


class Wrong(nn.Module):
    """Returns what it was made with, applied to x."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, label):
        return self.answer(x)


@pytest.mark.parametrize("method", METHODS)
def test_networks_of_the_wrong_kind(method):
    """Another shape, also one that broadcasts, is a ValueError with both; no tensor is a TypeError."""
    for answer, shape in ((lambda x: x[:, :1], (3, 1)), (lambda x: x[:1], (1, 2)), (lambda x: x.sum(), ())):
        with pytest.raises(ValueError, match=rf"network's output has shape {re.escape(str(shape))}, expected \(3, 2\)"):
            sample(ScoreNet(Wrong(answer), VPSDE()), (3, 2), method=method, steps=2, seed=0)
    for answer in (lambda x: (x, x), lambda x: None, lambda x: x.numpy()):
        with pytest.raises(TypeError, match="the network must return a tensor, got"):
            sample(ScoreNet(Wrong(answer), VPSDE()), (3, 2), method=method, steps=2, seed=0)


@pytest.mark.parametrize("method", FIXED)
def test_nan_names_step_and_time(method):
    """The step in which it appeared, and the time at which that step began."""

    class Late(Bend):
        def forward(self, x, label):
            return torch.where((label < 0.35)[:, None], math.nan, super().forward(x, label))

    with pytest.raises(NonFiniteError, match=r"step \d+, which began at t = 0\.\d+") as caught:
        sample(ScoreNet(Late(), VPSDE()), (2, 2), method=method, grid=[1.0, 0.8, 0.6, 0.4, 0.3, 0.2], seed=0)
    step, t = re.search(r"step (\d+), which began at t = ([0-9.]+)", str(caught.value)).groups()
    assert (int(step), float(t.rstrip("."))) in ((3, 0.4), (4, 0.3))


@pytest.mark.parametrize("method", METHODS)
def test_seeds_of_the_wrong_number_or_kind(method):
    """One per sample, or one int."""
    model = ScoreNet(Bend(), VPSDE())
    for seeds in ([1, 2], [], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=f"got {len(seeds)} seeds for a batch of 3"):
            sample(model, (3, 2), method=method, steps=2, seed=seeds)
    for seed in (1.5, "1", [1, 2, 3.5], True):
        with pytest.raises(TypeError, match="seed must be"):
            sample(model, (3, 2), method=method, steps=2, seed=seed)


# -- bound and free models -------------------------------------------------------------------------------------------


def by_hand(sampler, model, x, times, seed, final):
    """The loop with the model itself in place of a bound one."""
    state, noise = sampler.start(model, times), RandomSource(seed, "cpu", len(x))
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x = sampler.step(model, x, t, s, state, noise)
    return model.denoise(x, float(times[-1])) if final else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_bound_models_equal_free_ones(method, dtype):
    """A solve with looked-up coefficients and labels ends where one with the model's own checks and coefficients does."""
    sampler = METHODS[method]()
    if method in ADAPTIVE:  # a bfloat16 network is too rough for more
        sampler.rtol = sampler.atol = 0.05
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    x, eps = RandomSource(0, "cpu", 3).normal((3, 2), kind), torch.finfo(kind).eps
    for parameterization in PARAMETERIZATIONS:
        model = ScoreNet(Bend(dtype), VPSDE(t_min=1e-3), parameterization, sigma_data=0.6)
        times = time_grid(sampler, model, 3)
        with torch.no_grad():
            bound = run(sampler, model, x.clone(), times, RandomSource(1, "cpu", 3), denoise_final=True)
            free = by_hand(sampler, model, x.clone(), times, 1, True)
        assert bound.dtype == kind
        size = float(free.abs().max())
        if dtype == torch.bfloat16:  # a last bit of x may round to another bfloat16
            torch.testing.assert_close(bound, free, rtol=3e-2, atol=3e-2 * max(size, 1))
        else:
            torch.testing.assert_close(bound, free, rtol=2e4 * eps, atol=2e3 * eps * size)


class Offset(ScoreNet):
    """A network whose denoiser is moved, as a guidance term would."""

    def denoise(self, x, t, cond=None):
        return 0.5 * super().denoise(x, t, cond) + 0.2


class OffsetOutput(ScoreNet):
    """A network whose raw output is moved."""

    def output(self, x, t, cond=None):
        return 0.5 * super().output(x, t, cond) + 0.2


class Plain(ScoreModel):
    """A model that has nothing but a denoiser."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sde, self.sigma_data = model, model.sde, model.sigma_data

    def denoise(self, x, t, cond=None):
        return self.model.denoise(x, t, cond)


@pytest.mark.parametrize("cls", [Offset, OffsetOutput])
@pytest.mark.parametrize("method", METHODS)
def test_subclasses_that_change_the_denoiser(method, cls):
    """Every method uses the overridden method: the samples are those of a plain model with that denoiser."""
    model = cls(Bend(torch.float64), VPSDE(t_min=1e-3), "denoise", sigma_data=0.6)
    x = RandomSource(0, "cpu", 4).normal((4, 2), torch.float64)
    options = dict(method=method, steps=5, x_init=x, seed=1)
    got, expected = (sample(m, (4, 2), **options) for m in (model, Plain(model)))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    unchanged = ScoreNet(model.net, model.sde, "denoise", sigma_data=0.6)
    assert not torch.allclose(got, sample(unchanged, (4, 2), **options), atol=1e-2)


def test_a_sampler_of_ones_own(sde):
    """Sampler needs step() alone; it gets the bound model, floats for times, and denoise_final at the end."""
    seen = []

    class Jump(Sampler):
        def step(self, model, x, t, s, state, noise, cond=None):
            seen.append((t, s))
            return float(sde.alpha(s)) * model.denoise(x, t, cond)

    net = Bend()
    x = sample(ScoreNet(net, sde, "edm"), (2, 2), method=Jump(), nfe=4, seed=0)
    assert torch.isfinite(x).all()
    assert net.calls == 4
    assert [t for t, _ in seen] == uniform_time(sde, 3).tolist()[:-1]


def test_starts_of_processes_that_end_early():
    """Rectified flow's stochastic methods start at t_max = 0.999, its flow at 1; both from the prior."""
    model = ScoreNet(Bend(), RectifiedFlow(), "velocity")
    for method, t in (("euler", 0.999), ("ode", 1.0)):
        record = Trajectory()
        sample(model, (2, 2), method=method, steps=2, seed=0, trajectory=record)
        assert record.times[0] == t
        assert torch.equal(record.states[0], RandomSource(0, "cpu", 2).normal((2, 2), torch.float32))
    ve = Trajectory()
    sample(ScoreNet(Bend(), VESDE()), (2, 2), method="ddim", steps=2, seed=0, trajectory=ve)
    torch.testing.assert_close(ve.states[0], 50.0 * RandomSource(0, "cpu", 2).normal((2, 2), torch.float32))


def test_what_is_no_grid_or_no_trajectory():
    """Names, strings and tables are refused by name; an array of times is taken."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 0.5).diffuse(VPSDE())
    times = np.array([1.0, 0.5, 0.1])
    assert sample(model, (2, 2), method="ddim", grid=times, seed=0).shape == (2, 2)
    for bad, error in (("karras", TypeError), (["a", "b"], TypeError), (torch.ones(2, 2), ValueError)):
        with pytest.raises(error, match="grid"):
            sample(model, (2, 2), method="ddim", grid=bad, seed=0)
    with pytest.raises(ValueError, match="leave out nfe"):
        sample(model, (2, 2), method="ddim", grid=[1.0, 0.5], nfe=5, seed=0)
    with pytest.raises(TypeError, match="trajectory"):
        sample(model, (2, 2), method="ddim", trajectory=True, seed=0)
    with pytest.raises(ValueError, match="brownian"):
        sample(model, (2, 2), method="auto", brownian=True, seed=0)


def test_samplers_and_models_that_return_something_else():
    """A step or a denoiser of another shape stops with both shapes."""

    class Half(Sampler):
        def step(self, model, x, t, s, state, noise, cond=None):
            return x[:2]

    class Narrow(ScoreModel):
        def __init__(self):
            super().__init__()
            self.sde = VPSDE()

        def denoise(self, x, t, cond=None):
            return x[:, :1]

    model = GaussianMixture.isotropic([[0.0, 0.0]], 0.5).diffuse(VPSDE())
    with pytest.raises(ValueError, match=r"Half.step must return .*\(4, 2\).*\(2, 2\)"):
        sample(model, (4, 2), method=Half(), seed=0)
    for method in ("ddim", "auto", "heun", "pc"):
        with pytest.raises(ValueError, match=r"\(4, 1\), expected \(4, 2\)"):
            sample(Narrow(), (4, 2), method=method, seed=0)


def test_noise_where_there_can_be_none():
    """Singlestep is deterministic; adaptive samplers inside others have no number of evaluations to ask for."""
    with pytest.raises(ValueError, match="deterministic"):
        Singlestep(Data(Tau(1.0)))
    with pytest.raises(TypeError, match=r"Data\(Tau\(0.5\)\)"):
        Data(0.5)
    model = GaussianMixture.isotropic([[0.0, 0.0]], 0.5).diffuse(VPSDE())
    for adaptive in (TorchSDE(adaptive=True), PredictorCorrector(ProbabilityFlow())):
        with pytest.raises(ValueError, match="chooses its own number"):
            sample(model, (2, 2), method=adaptive, nfe=11, seed=0)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_samples():
    """compile=True: the same numbers to rounding, compiled once; other models say that they have nothing to compile."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    model = ScoreNet(Bend(), VPSDE(), "noise")
    plain, first, again = (
        sample(model, (4, 2), method="dpm++2m", steps=5, seed=0, compile=c) for c in (False, True, True)
    )
    torch.testing.assert_close(first, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, again)
    exact = GaussianMixture.isotropic([[0.0, 0.0]], 0.5).diffuse(VPSDE())
    with pytest.raises(ValueError, match="plain ScoreNet"):
        sample(exact, (4, 2), method="ddim", seed=0, compile=True)
