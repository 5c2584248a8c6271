"""What a solve carries from step to step: one kind of row per sampler, single steps, and what is remembered."""

import gc

import numpy as np
import pytest
import torch
from torch import nn

from scoresde import METHODS, VPSDE, GaussianMixture, ScoreNet, interpolate, sample, slerp
from scoresde.rng import RandomSource
from scoresde.samplers import (
    DDIM,
    Ancestral,
    Data,
    EulerMaruyama,
    FewStep,
    FlowEuler,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Sampler,
    ScipyRK45,
    Singlestep,
    State,
    StochasticHeun,
    Tau,
    TorchDiffEq,
    run,
)

STOCHASTIC = {
    "pc",
    "euler",
    "reverse-diffusion",
    "ancestral",
    "langevin",
    "edm",
    "sde-dpm++2m",
    "sde-dpm++3m",
    "sa-solver",
    "er-sde",
    "sde",
}
ADAPTIVE = {"ode", "torchdiffeq", "rk45"}


class Bend(nn.Module):
    """A noise prediction that is not linear."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, x, label, cond=None):
        return self.weight * x / (1 + 0.1 * x * x)


def model_and_start(n=4):
    """A network on VP and a state in float64."""
    return ScoreNet(Bend(), VPSDE(t_min=1e-3), sigma_data=0.6), RandomSource(0, "cpu", n).normal((n, 2), torch.float64)


# -- what a sampler says of itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_a_sampler_is(method):
    """`stochastic` and `adaptive` of every method are what its samples show."""
    sampler = METHODS[method]()
    assert sampler.stochastic == (method in STOCHASTIC)
    assert sampler.adaptive == (method in ADAPTIVE)
    assert (sampler.solve_options is not None) == (method == "ode")
    model, x = model_and_start()
    a, b = (sample(model, (4, 2), method=sampler, steps=8, x_init=x, seed=s) for s in (1, 2))
    assert torch.equal(a, b) != sampler.stochastic


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (DDIM(0.5), True),
        (EulerMaruyama(0.0), False),
        (StochasticHeun(s_churn=0.0), False),
        (Multistep(Data(Tau(0.0)), 2), False),
        (Multistep(Data(Tau(0.5)), 2), True),
        (PredictorCorrector(DDIM(), None), False),
        (PredictorCorrector(Ancestral(), None), True),
        (PredictorCorrector(DDIM(), Langevin()), True),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Sampler) else str(v),
)
def test_options_that_decide_about_noise(sampler, expected):
    """A sampler draws noise or not by its options; two seeds tell."""
    assert sampler.stochastic == expected
    model, x = model_and_start()
    a, b = (sample(model, (4, 2), method=sampler, steps=3, x_init=x, seed=s) for s in (1, 2))
    assert torch.equal(a, b) != expected


@pytest.mark.parametrize("method", METHODS)
def test_brownian_is_for_stochastic_methods(method):
    """A path for a method that draws no noise is refused, whatever library solves it."""
    model, x = model_and_start()
    options = dict(method=method, steps=2, x_init=x, seed=0, brownian=True)
    if method in STOCHASTIC:
        assert torch.isfinite(sample(model, (4, 2), **options)).all()
    else:
        with pytest.raises(ValueError, match="draws no noise"):
            sample(model, (4, 2), **options)


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_row_a_step_of_one_kind(method):
    """`start` makes one row per interval, all of the class that the sampler names."""
    model, x = model_and_start()
    sampler = METHODS[method]()
    for steps in (1, 5):
        times = sampler.times(model, steps, event_shape=x.shape[1:])
        state = sampler.start(model.prepare(x, times), times)
        assert state.times == times.tolist()
        assert [type(row) for row in state.rows] == [sampler.row_type] * (len(times) - 1)
        assert state.index == 0


WITHOUT_MEMORY = [
    DDIM(),
    DDIM(0.7),
    EulerMaruyama(),
    FlowEuler(),
    ReverseDiffusion(),
    Ancestral(),
    Heun(),
    Singlestep("noise", "midpoint"),
    Singlestep("data", "third"),
    PredictorCorrector(),
    PredictorCorrector(Heun()),
    StochasticHeun(s_max=50.0, churn_steps=200),
    ProbabilityFlow(),
    ScipyRK45(),
    TorchDiffEq(),
]


@pytest.mark.parametrize("sampler", WITHOUT_MEMORY, ids=lambda s: type(s).__name__)
def test_a_step_alone_is_the_step_of_a_solve(sampler):
    """Outside of any solve, and at any place of a prepared one, a step from t to s gives the same numbers."""
    model, x = model_and_start()
    times = torch.linspace(1.0, 1e-3, 201, dtype=torch.float64)
    whole, points = sampler.start(model, times), times.tolist()
    with torch.no_grad():
        for i in (120, 121, 40):  # on, and back again
            t, s = points[i : i + 2]
            inside, outside = (
                sampler.step(model, x.clone(), t, s, state, RandomSource(3, "cpu", 4)) for state in (whole, State())
            )
            torch.testing.assert_close(inside, outside, rtol=1e-12, atol=1e-12)
            assert not torch.equal(inside, x)


def test_churn_of_a_single_step():
    """How much noise a step of EDM's sampler adds depends on the solve's number of steps: said, or taken from the grid."""
    model, x = model_and_start()
    sampler, times = StochasticHeun(s_max=50.0), torch.linspace(1.0, 1e-3, 201, dtype=torch.float64)
    t, s = times.tolist()[120:122]
    assert sampler.gamma(200) == 30.0 / 200
    assert StochasticHeun(churn_steps=100).gamma(7) == 30.0 / 100

    def step(sampler, state):
        with torch.no_grad():
            return sampler.step(model, x.clone(), t, s, state, RandomSource(3, "cpu", 4))

    expected = step(sampler, sampler.start(model, times))
    for alone in (StochasticHeun(s_max=50.0, churn_steps=200), PredictorCorrector(sampler, None)):
        if isinstance(alone, PredictorCorrector):
            with pytest.raises(ValueError, match="churn_steps"):
                step(alone, State())
        else:
            torch.testing.assert_close(step(alone, State()), expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="churn_steps"):
        step(sampler, State())
    assert torch.isfinite(step(StochasticHeun(s_churn=0.0), State())).all()


@pytest.mark.parametrize("method", ["dpm++2m", "dpm++3m", "unipc3", "deis", "ipndm", "ddim", "heun", "sde-dpm++3m"])
def test_steps_by_hand_add_up_to_a_solve(method):
    """Steps one after another from an empty state are the solve: each continues what the state has seen."""
    model, x = model_and_start()
    sampler, times = METHODS[method](), torch.linspace(0.9, 0.1, 8, dtype=torch.float64)
    state, noise, y = State(), RandomSource(1, "cpu", 4), x.clone()
    with torch.no_grad():
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            y = sampler.step(model, y, t, s, state, noise)
        expected = run(sampler, model, x.clone(), times, RandomSource(1, "cpu", 4), denoise_final=False)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)


def test_a_multistep_solve_is_not_entered_in_the_middle():
    """Rows that count on earlier predictions say so; a solve of what is left starts there."""
    model, x = model_and_start()
    sampler, times = Multistep("data", 3), torch.linspace(1.0, 1e-3, 9, dtype=torch.float64)
    points = times.tolist()
    with pytest.raises(ValueError, match=r"reuses predictions of the steps before it; start a solve there"):
        sampler.step(model, x, points[4], points[5], sampler.start(model, times), RandomSource(0, "cpu", 4))
    rest = sampler.start(model, times[4:])
    first = sampler.step(model, x, points[4], points[5], rest, RandomSource(0, "cpu", 4))
    alone = sampler.step(model, x, points[4], points[5], State(), RandomSource(0, "cpu", 4))
    torch.testing.assert_close(first, alone, rtol=1e-12, atol=1e-12)


def test_a_sampler_with_columns_and_no_row_type():
    """One's own `coefficients` arrive in the step as a plain tuple."""

    class Halve(Sampler):
        def coefficients(self, sde, t, s):
            return sde.alpha(s), sde.sigma(s)

        def step(self, model, x, t, s, state, noise, cond=None):
            row = self.row(model, state, t, s)
            assert type(row) is tuple
            return row[0] * model.denoise(x, t, cond)

    model, x = model_and_start()
    assert torch.isfinite(sample(model, (4, 2), method=Halve(), steps=3, x_init=x)).all()


# -- memory ----------------------------------------------------------------------------------------------------------


def alive_at_the_last_evaluation(sampler, steps):
    """How many tensors of the state's size there are when the network is called for the last time."""
    found = []

    class Watched(Bend):
        def forward(self, x, label, cond=None):
            found.append(0)
            if len(found) == steps:
                found[-1] = sum(type(t) is torch.Tensor and t.shape == x.shape for t in gc.get_objects())
            return super().forward(x, label, cond)

    sample(ScoreNet(Watched(), VPSDE(t_min=1e-3)), (3, 37), method=sampler, steps=steps, seed=0)
    return found[steps - 1]


@pytest.mark.parametrize("method", ["auto", "dpm++3m", "unipc3"])
def test_memory_does_not_grow_with_the_steps(method):
    """Predictions that no later step uses are let go: with 60 steps as many tensors live as with 12."""
    few, many = (alive_at_the_last_evaluation(METHODS[method](), n) for n in (12, 60))
    assert 3 <= many <= few + 2 <= 12


def test_memory_of_a_tuned_scheme():
    """A scheme whose steps use three predictions keeps two, however many evaluations it has."""
    from scoresde.samplers.few_step import Scheme, untuned

    n, sde = 40, VPSDE(t_min=1e-3)
    r_max, r_min = (float(torch.exp(-0.5 * sde.log_snr(t))) for t in (1.0, 1e-3))
    plain = untuned(r_max, r_min, 1.0, 2.0, n)
    banded = Scheme(plain.r, plain.gain, np.triu(plain.weights, -2))
    model = ScoreNet(Bend(), sde)
    sampler = FewStep(banded, 1.0)
    state = sampler.start(model, sampler.times(model, n))
    assert state.memory.reach == 3
    x, lengths = torch.ones(1, 2), []
    for t, s in zip(state.times[:-1], state.times[1:], strict=True):
        with torch.no_grad():
            x = sampler.step(model, x, t, s, state, RandomSource(0, "cpu", 1))
        lengths.append(len(state.memory.predictions))
    assert max(lengths) == 2


# -- options of the wrong kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddim", "auto", "ode", "dpm++2m"])
def test_more_steps_than_anyone_needs(method):
    """10^9 steps would take gigabytes: refused before memory is, by every way to say it."""
    model, _ = model_and_start()
    with pytest.raises(ValueError, match="at most 1000000"):
        sample(model, (1, 2), method=method, steps=10**9)
    with pytest.raises(ValueError, match="at most 1000000"):
        sample(model, (1, 2), method=method, steps=10**9, grid=lambda sde, n: torch.linspace(1, 0, n + 1))
    if method != "ode":
        with pytest.raises(ValueError, match="at most 1000000"):
            sample(model, (1, 2), method=method, nfe=10**9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(steps=True), TypeError, "steps must be an integer"),
        (dict(steps="5"), TypeError, "steps must be an integer"),
        (dict(grid=[True, False]), TypeError, "must be real numbers"),
        (dict(grid=torch.tensor([True, False])), TypeError, "must be real numbers"),
        (dict(grid=[1 + 0j, 0.5]), TypeError, "must be real numbers"),
        (dict(grid=np.array([1.0, 0.5]) + 0j), TypeError, "must be real numbers"),
        (dict(grid=lambda sde, n: torch.linspace(1, 0.1, n)), ValueError, "a grid of 3 steps has 4 times"),
        (dict(grid=lambda sde, n: torch.ones(n + 1, dtype=torch.bool)), TypeError, "floating-point tensor of times"),
        (dict(grid=lambda sde, n: [1.0, 0.5, 0.2, 0.1]), TypeError, "floating-point tensor of times, got list"),
        (dict(t_max="0.5"), TypeError, "t_max must be a time"),
        (dict(t_max=True), TypeError, "t_max must be a time"),
        (dict(denoise_final="no"), TypeError, "denoise_final must be"),
        (dict(x_init=torch.ones(4, 2, dtype=torch.int64)), TypeError, "x_init must hold floating-point"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_options_of_the_wrong_kind(options, error, message):
    """One line that says what was given."""
    model, _ = model_and_start()
    with pytest.raises(error, match=message):
        sample(model, (4, 2), method="ddim", **({"steps": 3} | options))


def test_a_grid_function_in_single_precision():
    """Its times are taken in float64, as all times are."""
    model, x = model_and_start()
    grid = lambda sde, n: torch.linspace(1.0, 0.5, n + 1)  # noqa: E731
    assert torch.isfinite(sample(model, (4, 2), method="ddim", steps=3, x_init=x, grid=grid)).all()


def test_weights_that_are_no_numbers():
    """NaN, text, truth values and complex weights between two examples are refused."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 0.5).diffuse(VPSDE())
    a, b = torch.ones(2, 2), torch.eye(2)
    for weight in (float("nan"), float("inf"), torch.tensor([0.1, float("nan")])):
        with pytest.raises(ValueError, match="weight must be finite"):
            slerp(a, b, weight)
    for weight in ("half", True, 1j, None):
        with pytest.raises(TypeError, match="weight must be real numbers"):
            slerp(a, b, weight)
    for weights in ([True, False], "ab", [1j]):
        with pytest.raises(TypeError, match="weights must be real numbers"):
            interpolate(model, a, b, weights)
    with pytest.raises(ValueError, match="at most"):
        interpolate(model, a, b, 10**9)
    assert interpolate(model, a, b, np.int64(2)).shape == (2, 2, 2)


def test_advice_where_the_state_explodes():
    """A noise-predicting network where almost no signal is left: the error says what to try."""

    class Loud(Bend):
        def forward(self, x, label, cond=None):
            return x * 1e200

    with pytest.raises(FloatingPointError, match=r"clip the denoiser: Clipped\(model\)"):
        sample(ScoreNet(Loud(), VPSDE()), (2, 2), method="ddim", steps=10, seed=0)
