"""Samplers: published formulas, exact weak errors, orders of convergence, laws of samples, and faults."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from scoresde import (
    METHODS,
    VESDE,
    VPSDE,
    CosineSDE,
    GaussianMixture,
    NonFiniteError,
    RectifiedFlow,
    ScoreNet,
    SubVPSDE,
    decode,
    encode,
    sample,
)
from scoresde.grids import uniform_log_snr
from scoresde.rng import RandomSource
from scoresde.samplers import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    State,
    Trajectory,
    transition,
)

STEPS = 8
LINEAR = {
    "euler": EulerMaruyama(),
    "reverse-diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
    "ancestral-large": Ancestral("large"),
    "ddim": DDIM(),
    "ddim-half": DDIM(0.5),
    "ddim-one": DDIM(1.0),
}


ADAPTIVE = ("ode", "torchdiffeq", "rk45")
SHARED = ("torchdiffeq", "rk45")  # step sizes are shared by the batch, as these libraries do
MADE = {name: make() for name, make in METHODS.items()}
DETERMINISTIC = {name for name, made in MADE.items() if made.convergence_order or name in (*ADAPTIVE, "auto")}


def steps_of(method, steps=STEPS):
    """A small number of steps; an adaptive method takes what it needs."""
    return None if method in ADAPTIVE else steps


# -- formulas of the literature --------------------------------------------------------------------------------------


def affine(sampler, sde, t, s, x, score):
    """Mean and noise scale of one step, from the score: D = (x + sigma^2 score) / alpha."""
    pair = (torch.tensor([v], dtype=torch.float64) for v in (t, s))
    a, b, c = (float(v) for v in sampler.coefficients(sde, *pair))
    denoised = (x + float(sde.sigma(t)) ** 2 * score) / float(sde.alpha(t))
    return a * x + b * denoised, c


X, SCORE = torch.tensor([1.3, -0.7], dtype=torch.float64), torch.tensor([-0.4, 2.1], dtype=torch.float64)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.98), (0.5, 0.4), (0.3, 0.01), (0.02, 1e-5)])
def test_ancestral_is_ddpm_for_vp(t, s):
    """(x + beta score)/sqrt(1 - beta), variance beta (1 - abar_s)/(1 - abar_t) or beta: Ho et al. 2020, eqs. 7 and 11."""
    sde = VPSDE()
    bar_t, bar_s = float(sde.alpha(t)) ** 2, float(sde.alpha(s)) ** 2
    beta = 1 - bar_t / bar_s
    mean, noise = affine(Ancestral(), sde, t, s, X, SCORE)
    torch.testing.assert_close(mean, (X + beta * SCORE) / math.sqrt(1 - beta), rtol=1e-9, atol=1e-12)
    assert noise == pytest.approx(math.sqrt(beta * (1 - bar_s) / (1 - bar_t)), rel=1e-9)
    mean, noise = affine(Ancestral("large"), sde, t, s, X, SCORE)
    torch.testing.assert_close(mean, (X + beta * SCORE) / math.sqrt(1 - beta), rtol=1e-9, atol=1e-12)
    assert noise == pytest.approx(math.sqrt(beta), rel=1e-9)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.98), (0.5, 0.4), (0.3, 0.01), (0.02, 1e-5)])
def test_ve_formulas(t, s):
    """Ancestral is SMLD's rule (Song et al. 2021, equation 47), reverse diffusion algorithm 2's predictor."""
    sde = VESDE()
    high, low = float(sde.sigma(t)) ** 2, float(sde.sigma(s)) ** 2
    expected = X + (high - low) * SCORE
    mean, noise = affine(Ancestral(), sde, t, s, X, SCORE)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    assert noise == pytest.approx(math.sqrt(low * (high - low) / high), rel=1e-9)
    mean, noise = affine(ReverseDiffusion(), sde, t, s, X, SCORE)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    assert noise == pytest.approx(math.sqrt(high - low), rel=1e-9)


def test_euler_is_equation_6(sde):
    """x - (f x - g^2 score) h, noise g sqrt(h)."""
    t, s = 0.6, 0.57
    f, g, h = float(sde.drift_scale(t)), float(sde.diffusion(t)), t - s
    mean, noise = affine(EulerMaruyama(), sde, t, s, X, SCORE)
    torch.testing.assert_close(mean, X - (f * X - g**2 * SCORE) * h, rtol=1e-9, atol=1e-9)
    assert noise == pytest.approx(g * math.sqrt(h), rel=1e-9)


def test_reverse_diffusion_tends_to_euler(sde):
    """Both discretise one reverse SDE: their difference shrinks like h^2, that of the noise like h^1.5."""
    differences = []
    for h in (1e-3, 1e-4):
        (a, c), (b, d) = (affine(k, sde, 0.5, 0.5 - h, X, SCORE) for k in (EulerMaruyama(), ReverseDiffusion()))
        differences.append((float((a - b).abs().max()), abs(c - d)))
    assert differences[1][0] < 0.02 * differences[0][0]
    assert differences[1][1] < 0.05 * differences[0][1]


def test_ddim_is_euler_in_the_straight_coordinates(sde):
    """eta = 0: with y = x/alpha and r = sigma/alpha, y_s = y_t + (r_s - r_t) eps_hat (Song, Meng & Ermon, eq. 14)."""
    t, s = 0.7, 0.3
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((float(sde.alpha(v)), float(sde.sigma(v))) for v in (t, s))
    expected = alpha_s * (X / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * (-sigma_t * SCORE))
    mean, noise = affine(DDIM(), sde, t, s, X, SCORE)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    assert noise == 0


def test_ddim_of_eta_one_is_ancestral(sde):
    """The same three coefficients on a whole grid."""
    times = uniform_log_snr(sde, 50)
    pairs = zip(
        DDIM(1.0).coefficients(sde, times[:-1], times[1:]),
        Ancestral().coefficients(sde, times[:-1], times[1:]),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_transition_composes(sde):
    """From s to t in one go or through a time between: the same scale and variance; and from data to t."""
    s, m, t = (torch.tensor([v], dtype=torch.float64) for v in (0.2, 0.5, 0.9))
    (a1, v1), (a2, v2), (a, v) = transition(sde, m, s), transition(sde, t, m), transition(sde, t, s)
    torch.testing.assert_close(a, a1 * a2)
    torch.testing.assert_close(v, a2**2 * v1 + v2)
    torch.testing.assert_close(a * sde.alpha(s), sde.alpha(t))


# -- exact weak errors on a Gaussian ---------------------------------------------------------------------------------

MEAN, VARIANCE = 0.7, 0.3  # of the data


def moments(sde, t):
    """Mean and variance of p_t."""
    return float(sde.alpha(t)) * MEAN, float(sde.alpha(t)) ** 2 * VARIANCE + float(sde.sigma(t)) ** 2


def chain_error(sampler, sde, steps):
    """Error of mean and variance at t_min when the affine chain starts from the exact p_{t_max}, computed exactly."""
    times = uniform_log_snr(sde, steps)
    mean, variance = moments(sde, sde.t_max)
    columns = (c.tolist() for c in sampler.coefficients(sde, times[:-1], times[1:]))
    for t, a, b, c in zip(times.tolist(), *columns, strict=False):
        alpha, total = float(sde.alpha(t)), moments(sde, t)[1]
        gain = alpha * VARIANCE / total  # D = MEAN + gain (x - alpha MEAN)
        mean = (a + b * gain) * mean + b * (MEAN - gain * alpha * MEAN)
        variance = (a + b * gain) ** 2 * variance + c**2
    exact = moments(sde, sde.t_min)
    return abs(mean - exact[0]), abs(variance - exact[1])


@pytest.mark.parametrize("name", LINEAR)
def test_weak_convergence_is_first_order(sde, name):
    """Mean and variance of the chain converge to the data's, the variance at first order at least, for every process."""
    steps = (1000, 2000, 4000)
    mean, variance = zip(*(chain_error(LINEAR[name], sde, n) for n in steps), strict=True)
    assert mean[-1] < 0.01
    assert variance[-1] < 0.02
    assert variance[0] > 3.2 * variance[2] or variance[0] < 1e-9  # 4 for first order
    assert mean[0] > 3.2 * mean[2] or mean[0] < 1e-9


@pytest.mark.parametrize("snr", [0.1, 0.16, 0.4])
def test_langevin_stationary_variance(snr):
    """On a Gaussian of variance sigma^2 the chain settles at sigma^2 / (1 - snr^2), as the docstring says."""
    model = GaussianMixture.isotropic([[0.0]], 1e-3).diffuse(VESDE())
    n, sigma = 40_000, float(model.sde.sigma(0.5))
    source = RandomSource(0, "cpu", n)
    x = sigma * source.normal((n, 1), torch.float64)
    corrector = Langevin(snr, steps=math.ceil(2 / snr**2))
    x = corrector.correct(model, x, 0.5, 1.0, sigma, source)
    expected = sigma**2 / (1 - snr**2)
    assert float(x.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / n))


def test_langevin_leaves_the_marginal(ring8):
    """Many small corrector steps at one t keep exact samples exact (mean and covariance)."""
    sde, n = VPSDE(), 4000
    model = ring8.diffuse(sde)
    source = RandomSource(1, "cpu", n)
    x = sde.perturb(ring8.sample(n, seed=0), 0.3, source.normal((n, 2), torch.float64))
    alpha, sigma = float(sde.alpha(0.3)), float(sde.sigma(0.3))
    expected = alpha**2 * ring8.covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
    y = Langevin(0.05, steps=50).correct(model, x, 0.3, alpha, sigma, source)
    assert not torch.allclose(x, y)
    torch.testing.assert_close(y.T.cov(), expected, rtol=0, atol=0.06)


# -- orders of convergence -------------------------------------------------------------------------------------------

SMOOTH = GaussianMixture([0.4, 0.6], [[0.8, 0.2], [-0.6, -0.3]], [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]])


@pytest.mark.parametrize(("sampler", "order"), [(DDIM(), 1), (Heun(), 2)], ids=["ddim", "heun"])
def test_order_of_convergence(sde, sampler, order):
    """Slope of the error against the exact flow, float64, uniform log-SNR: first order for DDIM, second for Heun."""
    model = SMOOTH.diffuse(sde)
    start = sde.prior_std * torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = sample(
        model, (16, 2), method=ProbabilityFlow(1e-11, 1e-11), x_init=start, grid=[sde.t_max, max(sde.t_min, 1e-12)]
    )
    counts, errors = [100, 200, 400], []
    for n in counts:
        x = sample(
            model, (16, 2), method=sampler, steps=n, x_init=start, grid=uniform_log_snr, denoise_final=False, seed=0
        )
        errors.append(float((x - truth).square().mean().sqrt()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.2 < slope < order + 0.5, f"slope {slope:.2f}, errors {errors}"


def test_flow_against_an_independent_solve(sde):
    """decode and encode equal scipy's DOP853 on dx/dt = velocity(x, t) in the original coordinates."""
    model, t_min = SMOOTH.diffuse(sde), max(sde.t_min, 1e-5)
    z = sde.prior_std * torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def f(t, y):
        return model.velocity(torch.from_numpy(y).reshape(3, 2), t).flatten().numpy()

    solution = solve_ivp(f, (1.0, t_min), z.flatten().numpy(), "DOP853", rtol=1e-9, atol=1e-10)
    expected = torch.from_numpy(solution.y[:, -1]).reshape(3, 2)
    x = sample(model, (3, 2), method=ProbabilityFlow(1e-9, 1e-9), x_init=z, grid=[1.0, t_min])
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    if sde.t_min > 0:
        torch.testing.assert_close(decode(model, z, rtol=1e-8, atol=1e-8), expected, rtol=0, atol=1e-5)
        back = encode(model, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(back / sde.prior_std, z / sde.prior_std, rtol=0, atol=1e-4)


# -- laws of samples -------------------------------------------------------------------------------------------------

TARGET = GaussianMixture(
    [0.5, 0.3, 0.2],
    [[1.0, 0.0], [-0.7, 0.8], [-0.3, -0.9]],
    [[[0.04, 0.01], [0.01, 0.02]], [[0.01, 0.0], [0.0, 0.06]], [[0.02, -0.01], [-0.01, 0.02]]],
)
N = 2000


def sliced_distance(x, y):
    """Wasserstein distance of order 1, averaged over 32 directions of the plane."""
    angle = math.pi * torch.arange(32, dtype=torch.float64) / 32
    directions = torch.stack([angle.cos(), angle.sin()])
    return float(((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean())


def statistics(x, y):
    """Distances of samples x from the exact mean and covariance, and from exact samples y (sliced Wasserstein)."""
    return (
        float((x.mean(0) - TARGET.mean).abs().max()),
        float((x.T.cov() - TARGET.covariance).abs().max()),
        sliced_distance(x, y),
    )


@pytest.fixture(scope="module")
def limits():
    """Twice the 95 % quantile over 40 exact samples for the moments (about 4 sigma), 1.5 times it for the distance."""
    pairs = [statistics(TARGET.sample(N, seed=2 * i), TARGET.sample(N, seed=2 * i + 1)) for i in range(100, 140)]
    columns = zip(*pairs, strict=True)
    return [k * float(np.quantile(column, 0.95)) for k, column in zip((2, 2, 1.5), columns, strict=True)]


@pytest.mark.parametrize("method", ["euler", "pc", "ode", "ancestral", "reverse-diffusion", "ddim", "heun"])
@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()], ids=lambda s: type(s).__name__)
def test_samples_have_the_law_of_the_data(sde, method, limits):
    """Mean, covariance and sliced distance are what exact samples of the same size show."""
    model = TARGET.diffuse(sde)
    x = sample(model, (N, 2), method=method, seed=5, steps=100 if method == "ddim" else None)
    got = statistics(x.double(), TARGET.sample(N, seed=6))
    for name, value, limit in zip(("mean", "covariance", "sliced distance"), got, limits, strict=True):
        assert value < limit, f"{name}: {value:.4f}, exact samples stay below {limit:.4f}"


def test_the_distance_notices_a_wrong_law(limits):
    """The check above can fail: a shift of 0.1, or 15 % more spread, is beyond what exact samples show."""
    exact, other = TARGET.sample(N, seed=6), TARGET.sample(N, seed=7)
    shifted = statistics(other + 0.1, exact)
    assert shifted[0] > limits[0]
    assert shifted[2] > limits[2]
    assert statistics(1.15 * other, exact)[1] > limits[1]


@pytest.mark.parametrize("sde", [CosineSDE(), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("method", ["ode", "heun", "ddim"])
def test_further_processes(sde, method, limits):
    """The deterministic samplers on the other processes."""
    x = sample(TARGET.diffuse(sde), (N, 2), method=method, seed=5, steps=None if method != "ddim" else 200)
    assert statistics(x.double(), TARGET.sample(N, seed=6))[2] < limits[2]


# -- shapes, few steps, seeds ----------------------------------------------------------------------------------------


class Shrink(nn.Module):
    """An elementwise noise prediction, the same for every shape; rational, so that it is bitwise row by row."""

    def __init__(self, weight=0.9):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x, label):
        return self.weight * x


@pytest.mark.parametrize("event", [(5,), (2, 7), (3, 4, 6), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_any_data_shape(method, event, device):
    """Vectors, series, images and volumes, in float32 on the model's device."""
    model = ScoreNet(Shrink(), VPSDE(), "noise").to(device)
    x = sample(model, (2, *event), method=method, steps=steps_of(method, 2), seed=0)
    assert x.shape == (2, *event)
    assert x.dtype == torch.float32
    assert x.device.type == device
    assert torch.isfinite(x).all()
    assert not x.requires_grad


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    "method", [*METHODS, DDIM(0.5), Ancestral("large"), PredictorCorrector(corrector=Langevin(rule="norm"))]
)
def test_few_steps_are_finite(sde, method, steps, ring8):
    """1 or 2 steps give finite samples, from every process."""
    assert torch.isfinite(sample(ring8.diffuse(sde), (64, 2), method=method, steps=steps, seed=0)).all()


@pytest.mark.parametrize("method", METHODS)
def test_seeds_per_sample(method):
    """A sample is bit for bit the same alone, in a batch, in another order, and in chunks; within the tolerance if shared."""

    def same(a, b):
        return torch.allclose(a, b, atol=1e-4) if method in SHARED else torch.equal(a, b)

    model = ScoreNet(Shrink(), VPSDE(), "noise")
    seeds = [5, 6, 7, 8, 2**45 + 1]
    whole = sample(model, (5, 3), method=method, steps=steps_of(method), seed=seeds)
    assert len({tuple(row) for row in whole.tolist()}) == 5
    for i, seed in enumerate(seeds):
        assert same(sample(model, (1, 3), method=method, steps=steps_of(method), seed=[seed])[0], whole[i])
    flipped = sample(model, (5, 3), method=method, steps=steps_of(method), seed=seeds[::-1])
    assert same(flipped.flip(0), whole)
    with pytest.raises(ValueError, match="got 5 seeds for a batch of 4"):
        sample(model, (4, 3), method=method, seed=seeds)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_samples(method, ring8):
    """An int seed fixes the samples; another gives others."""
    model = ring8.diffuse(VPSDE())
    a, b, c = (sample(model, (4, 2), method=method, steps=steps_of(method), seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("method", METHODS)
def test_x_init(method, ring8):
    """The given start is used (deterministic methods depend on it alone), is not written to, and sets the dtype."""
    model = ring8.diffuse(VPSDE())
    start = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = start.clone()
    a = sample(model, (6, 2), method=method, steps=steps_of(method), x_init=start, seed=1)
    b = sample(model, (6, 2), method=method, steps=steps_of(method), x_init=start, seed=2)
    assert torch.equal(start, kept)
    assert a.dtype == torch.float64
    assert torch.equal(a, b) == (method in DETERMINISTIC)
    assert sample(model, (6, 2), method=method, steps=1, x_init=start.bfloat16(), seed=1).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(6, 2\).*\(5, 2\)"):
        sample(model, (5, 2), method=method, x_init=start)
    with pytest.raises(TypeError, match="x_init"):
        sample(model, (6, 2), method=method, x_init=start.long())
    start[3] = math.nan
    with pytest.raises(ValueError, match=r"x_init.*\[3\]"):
        sample(model, (6, 2), method=method, x_init=start)


@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(method, image16):
    """B = 0 gives an empty tensor of the right shape, for every kind of seed."""
    model = image16.diffuse(VPSDE())
    for seed in (0, [], None):
        assert sample(model, (0, 1, 4, 4), method=method, seed=seed).shape == (0, 1, 4, 4)
    x, value = sample(model, (0, 1, 4, 4), method="ode", return_log_prob=True)
    assert x.shape == (0, 1, 4, 4)
    assert value.shape == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_trajectory(method, ring8):
    """Every time of the grid is recorded with its state, the last state is the result; the record is a copy."""
    model, record = ring8.diffuse(VPSDE()), Trajectory()
    x = sample(model, (4, 2), method=method, steps=5, seed=0, trajectory=record)
    plain = sample(model, (4, 2), method=method, steps=5, seed=0)
    assert torch.equal(x, plain)
    end = 6 if method == "auto" else 5  # its first move, from the prior to the first evaluation, is no step
    assert len(record.times) == len(record.states) == end + 1 + MADE[method].denoise_final
    assert record.times[0] == 1.0
    assert record.times[end] == VPSDE().t_min
    assert torch.equal(record.states[-1], x)
    assert torch.equal(record.states[0], RandomSource(0, "cpu", 4).normal((4, 2), torch.float32))
    assert len({float(s.sum()) for s in record.states}) == len(record.states)


def test_final_denoiser(ring8):
    """denoise_final replaces x at t_min by its denoised self, exactly once."""
    model = ring8.diffuse(VESDE())
    raw = sample(model, (4, 2), method="euler", steps=20, seed=0, denoise_final=False)
    torch.testing.assert_close(sample(model, (4, 2), method="euler", steps=20, seed=0), model.denoise(raw, 1e-5))
    flow = sample(model, (4, 2), method="ode", seed=0)
    torch.testing.assert_close(
        sample(model, (4, 2), method="ode", seed=0, denoise_final=True), model.denoise(flow, 1e-5), rtol=1e-4, atol=1e-4
    )


def test_a_single_step_by_hand(ring8):
    """step(...) works outside the loop with an empty state and agrees with the loop."""
    model = ring8.diffuse(VPSDE())
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for sampler in (DDIM(), Heun(), PredictorCorrector(), EulerMaruyama()):
        x = sampler.step(model, start.clone(), 0.8, 0.5, State(), RandomSource(1, "cpu", 3))
        loop = sample(model, (3, 2), method=sampler, x_init=start, grid=[0.8, 0.5], seed=1, denoise_final=False)
        torch.testing.assert_close(x, loop)


def test_methods_are_fresh_objects_with_documented_defaults():
    """METHODS is a plain dict of what makes a sampler; a class given as method= is explained."""
    assert METHODS["pc"] is PredictorCorrector
    assert PredictorCorrector().nfe_per_step == 2
    assert PredictorCorrector(corrector=None).nfe_per_step == 1
    assert PredictorCorrector(Heun(), Langevin(steps=3)).nfe_per_step == 5
    model = ScoreNet(Shrink(), VPSDE())
    with pytest.raises(TypeError, match=r"DDIM\(\.\.\.\)"):
        sample(model, (1, 2), method=DDIM)


def test_nfe_is_what_it_says(ring8):
    """nfe_per_step times steps, and one more for the final denoiser; ProbabilityFlow reports its own."""
    calls = [0]

    class Counting(Shrink):
        def forward(self, x, label):
            calls[0] += 1
            return super().forward(x, label)

    model = ScoreNet(Counting(), VPSDE())
    for method, make in METHODS.items():
        calls[0], made = 0, make()
        if method in ADAPTIVE:
            sample(model, (1, 2), method=made, seed=0)
            assert calls[0] == made.nfe > 10
        else:
            sample(model, (1, 2), method=made, steps=4, seed=0)
            assert calls[0] == 4 * made.nfe_per_step + made.denoise_final


# -- faults ----------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Shrinks, but returns NaN or infinity for the rows that cond marks, once t < 0.4."""

    def __init__(self, value=math.nan):
        super().__init__()
        self.value = value

    def forward(self, x, label, cond):
        wrong = (cond & (label < 0.4)).reshape(-1, *(1,) * (x.dim() - 1))
        return torch.where(wrong, self.value, 0.9 * x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_nan_from_the_network(method, value):
    """Every method stops with an error that names the step or evaluations, t and the samples."""
    model = ScoreNet(Broken(value), VPSDE(), "noise")
    marked = torch.tensor([False, True, False, True])
    with pytest.raises(NonFiniteError, match=r"rows \[1, 3\]") as caught:
        sample(model, (4, 1, 2, 2), method=method, steps=steps_of(method, 20), seed=0, cond=marked)
    text = str(caught.value)
    assert "2 of 4" in text
    assert "step" in text
    t = float(text.split("t = ")[1].split()[0].rstrip(",;."))
    assert t <= 0.45
    assert t > (0.1 if method in SHARED else 0.3)  # the steps of the others' libraries may reach further
    assert isinstance(caught.value, FloatingPointError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("method", METHODS)
def test_nan_everywhere(method):
    """NaN from the first evaluation on."""
    model = ScoreNet(Shrink(math.nan), VPSDE(), "noise")
    with pytest.raises(NonFiniteError, match=r"rows \[0, 1\]"):
        sample(model, (2, 2), method=method, steps=steps_of(method), seed=0)


def test_nan_in_the_final_denoiser_alone():
    """A network that fails only at t_min is found there."""

    class AtTheEnd(nn.Module):
        def forward(self, x, label):
            return torch.where((label < 1e-4)[:, None], math.nan, 0.9 * x)

    with pytest.raises(NonFiniteError, match=r"step 5.*t = 1e-05"):
        sample(ScoreNet(AtTheEnd(), VPSDE()), (2, 2), method="ddim", steps=5, seed=0)


def test_flow_that_cannot_finish():
    """Too small a budget is a RuntimeError with t, evaluations and advice."""
    model = GaussianMixture.isotropic([[-1.0], [1.0]], 0.01).diffuse(VPSDE())
    with pytest.raises(RuntimeError, match=r"rows \[0, 1\].*t = .*\d+ evaluations.*max_nfe"):
        sample(model, (2, 1), method=ProbabilityFlow(max_nfe=20), seed=0)


@pytest.mark.parametrize("rule", ["norm", "sigma"])
def test_zero_score(rule):
    """A score that is exactly zero leaves the Langevin step finite, for one row or for all."""

    class Zero(nn.Module):
        def forward(self, x, label):
            return torch.zeros_like(x)

    method = PredictorCorrector(corrector=Langevin(rule=rule, steps=2))
    for sde in (VPSDE(), VESDE()):
        x = sample(ScoreNet(Zero(), sde, "score"), (3, 2), method=method, steps=10, seed=0)
        assert torch.isfinite(x).all()
        assert float(x.abs().max()) < 1e4


def test_unknown_methods_and_bad_arguments(ring8):
    """The message lists the methods, or says what was expected."""
    model = ring8.diffuse(VPSDE())
    with pytest.raises(ValueError, match=r"'pcc'.*pc, euler, reverse-diffusion, .*, ode, torchdiffeq, rk45"):
        sample(model, (2, 2), method="pcc")
    for steps in (0, -5):
        for method in METHODS:
            with pytest.raises(ValueError, match="steps must be at least 1"):
                sample(model, (2, 2), method=method, steps=steps)
    with pytest.raises(TypeError, match="steps must be an integer"):
        sample(model, (2, 2), steps=2.5)
    for shape in ((2,), (-1, 2), (2, 0), ()):
        with pytest.raises(ValueError, match=r"shape must be \(B, \*event\)"):
            sample(model, shape)
    for shape in (7, "ab", None):
        with pytest.raises(TypeError, match="sequence of integers"):
            sample(model, shape)
    with pytest.raises(ValueError, match=r"\(2,\), got \(3,\)"):
        sample(model, (4, 3))
    with pytest.raises(TypeError, match="ScoreNet"):
        sample(Shrink(), (2, 2))
    with pytest.raises(ValueError, match="method='ode'"):
        sample(model, (2, 2), method="ddim", return_log_prob=True)
    for call in (encode, decode):
        with pytest.raises(ValueError, match="made for examples"):
            call(model, torch.zeros(2, 3))
        with pytest.raises(ValueError, match="NaN"):
            call(model, torch.full((2, 2), math.nan))
        with pytest.raises(TypeError, match="floating"):
            call(model, torch.zeros(2, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIM(-0.1),
        lambda: DDIM(1.5),
        lambda: DDIM(math.nan),
        lambda: Ancestral("medium"),
        lambda: Langevin(0.0),
        lambda: Langevin(1.0),
        lambda: Langevin(steps=0),
        lambda: Langevin(rule="batch"),
        lambda: ProbabilityFlow(rtol=0.0),
        lambda: ProbabilityFlow(atol=-1e-3),
        lambda: ProbabilityFlow(method="rk4"),
        lambda: ProbabilityFlow(max_nfe=0),
    ],
)
def test_bad_samplers(make):
    """Options are checked when a sampler is made."""
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_mode(method):
    """Dropout is off while sampling, gradients are not recorded, and every module's mode is restored, also after errors."""
    inner = nn.Dropout(0.5)
    net = nn.Sequential(nn.Linear(2, 8), inner, nn.Linear(8, 2))
    for p, g in zip(net.parameters(), range(4), strict=True):
        nn.init.uniform_(p, -0.3, 0.3, generator=torch.Generator().manual_seed(g))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
            self.frozen = nn.BatchNorm1d(2).eval()
            self.fail = False

        def forward(self, x, label):
            assert not torch.is_grad_enabled()
            assert not any(m.training for m in self.modules())
            return self.net(x) * (math.nan if self.fail else 1)

    model = ScoreNet(Net(), VPSDE()).train()
    model.net.frozen.eval()
    a, b = (sample(model, (4, 2), method=method, steps=steps_of(method), seed=0) for _ in range(2))
    assert torch.equal(a, b)
    model.net.fail = True
    with pytest.raises(NonFiniteError):
        sample(model, (4, 2), method=method, steps=steps_of(method), seed=0)
    assert model.training
    assert inner.training
    assert not model.net.frozen.training


def test_grids_that_leave_out_an_end():
    """Prior noise is not fed in below t_max, and densities are not answered for another time than t_min."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 1.0).diffuse(VPSDE())
    with pytest.raises(ValueError, match="pass x_init"):
        sample(model, (2, 2), method="ddim", grid=[0.5, 0.1])
    assert sample(model, (2, 2), method="ddim", grid=[0.5, 0.1], x_init=torch.zeros(2, 2)).shape == (2, 2)
    with pytest.raises(ValueError, match=r"grid ends at t = 0\.5"):
        sample(model, (2, 2), method="ode", grid=[1.0, 0.5], return_log_prob=True)
    with pytest.raises(ValueError, match="denoise_final"):
        sample(model, (2, 2), method="ode", denoise_final=True, return_log_prob=True)


def test_grids_where_a_method_is_undefined():
    """Rectified flow's drift diverges at t = 1: named before any work, with the range to keep to."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 1.0).diffuse(RectifiedFlow())
    with pytest.raises(ValueError, match=r"EulerMaruyama is undefined for RectifiedFlow .*0\.999"):
        sample(model, (2, 2), method="euler", grid=[1.0, 0.5, 0.1])
