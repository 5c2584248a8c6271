"""Stochastic samplers: exact laws of their chains on a Gaussian, weak orders, and the formulas of the literature.

On Gaussian data the denoiser is affine in x, so a chain is affine in its start and in every noise draw. Running one row per
draw, with a unit impulse for that draw alone, gives all responses, and their squares sum to the exact variance.
"""

import math

import pytest
import torch
from scipy.integrate import quad

from scoresde import EDMSDE, METHODS, VESDE, VPSDE, GaussianMixture, RectifiedFlow, ScoreModel, SubVPSDE, sample
from scoresde.grids import karras, uniform_log_snr
from scoresde.rng import RandomSource
from scoresde.samplers import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    BrownianPath,
    Data,
    ErSde,
    EulerMaruyama,
    FlowEuler,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    ReverseDiffusion,
    StochasticHeun,
    Tau,
    TorchSDE,
    run,
)

PROCESSES = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), RectifiedFlow()]
MEAN, STD = 0.7, 0.3  # of the data
HIGH, LOW = 1.5, 0.15  # sigma/alpha between which laws are compared
STEPS = (80, 160)


class Gaussian(ScoreModel):
    """The exact model of N(mean, std^2) in every entry; std = 0 for data in one point."""

    def __init__(self, sde, mean=MEAN, std=STD):
        super().__init__()
        self.sde, self.mean, self.std = sde, mean, std
        self.affine_at = {}

    def denoise(self, x, t, cond=None):
        if float(t) not in self.affine_at:
            alpha, variance = float(self.sde.alpha(t)), self.moments(t)[1]
            gain = alpha * self.std**2 / variance
            self.affine_at[float(t)] = gain, (1 - alpha * gain) * self.mean
        gain, shift = self.affine_at[float(t)]
        return gain * x + shift

    def moments(self, t):
        """Mean and variance of p_t."""
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        return alpha * self.mean, (alpha * self.std) ** 2 + sigma**2


class Impulses:
    """Draw k is 1 in row k + 2 and 0 elsewhere."""

    def __init__(self):
        self.draws = 0

    def normal(self, shape, dtype):
        z = torch.zeros(shape, dtype=dtype)
        if self.draws + 2 < shape[0]:
            z[self.draws + 2] = 1
        self.draws += 1
        return z


def exact_law(solve, mean, variance):
    """(mean, variance) of the result of solve(x, noise) when x has the given moments and the noise is standard normal."""
    probe = Impulses()
    solve(torch.full((1, 1), mean, dtype=torch.float64), probe)
    x = torch.full((probe.draws + 2, 1), mean, dtype=torch.float64)
    x[1] += 1
    y = solve(x, Impulses()).flatten()
    response = y[1:] - y[0]
    return float(y[0]), float(variance * response[0] ** 2 + response[1:].square().sum())


def law(sampler, model, times):
    """The exact law at times[-1] of a chain that starts from the exact marginal at times[0]."""

    def solve(x, noise):
        return run(sampler, model, x, times, noise, denoise_final=False)

    return exact_law(solve, *model.moments(float(times[0])))


def middle(sde, steps):
    """Times even in log-SNR from HIGH to LOW."""
    return sde.time(-2 * torch.linspace(math.log(HIGH), math.log(LOW), steps + 1, dtype=torch.float64))


# -- weak orders -----------------------------------------------------------------------------------------------------


def of_data(model, t, sampler):
    """Mean and variance of p_t: what most chains tend to."""
    return model.moments(t)


def of_corrector(model, t, sampler):
    """What Langevin steps settle at: the variance V of p_t over 1 - snr^2 sigma^2 / V, however fine the grid."""
    mean, variance = model.moments(t)
    share = float(model.sde.sigma(t)) ** 2 / variance
    return mean, variance / (1 - sampler.corrector.snr**2 * share)


# weak order, what the chain tends to, the sampler; orders measured on N(0.7, 0.3^2), where the nodes of a multistep method
# reach back over noise and hold it at order 2 however many there are
TABLE = {
    "euler": (1, of_data, METHODS["euler"]()),
    "euler, eta = 0.4": (1, of_data, EulerMaruyama(0.4)),
    "euler, eta = 2": (1, of_data, EulerMaruyama(2.0)),
    "reverse-diffusion": (1, of_data, METHODS["reverse-diffusion"]()),
    "ancestral": (1, of_data, METHODS["ancestral"]()),
    "ancestral, large": (1, of_data, Ancestral("large")),
    "ddim, eta = 0.5": (1, of_data, DDIM(0.5)),
    "edm": (2, of_data, StochasticHeun(s_churn=8.0, s_min=0.0, s_max=10.0, s_noise=1.0)),
    "sde-dpm++1": (1, of_data, Multistep(Data(Tau()), 1)),
    "sde-dpm++2m": (2, of_data, METHODS["sde-dpm++2m"]()),
    "sde-dpm++2m, exact": (2, of_data, Multistep(Data(Tau()), 2)),
    "sde-dpm++3m": (2, of_data, METHODS["sde-dpm++3m"]()),
    "sa-solver": (2, of_data, METHODS["sa-solver"]()),
    "er-sde-1": (1, of_data, Multistep(Data(ErSde()), 1, variable="ratio")),
    "er-sde-2": (2, of_data, Multistep(Data(ErSde()), 2, variable="ratio")),
    "pc": (1, of_corrector, METHODS["pc"]()),
    "pc, ddim": (1, of_corrector, PredictorCorrector(DDIM(), Langevin(0.3))),
    "langevin": (1, of_corrector, METHODS["langevin"]()),
}
ELSEWHERE = {
    "er-sde": "its errors of second and third order cancel somewhere: test_third_order_of_er_sde",
    "sde": "its path is not made of one draw per step: test_torchsde_is_euler_maruyama",
}


def test_the_table_holds_every_stochastic_method():
    """A new method cannot be left out: whatever is not deterministic is in the table or tested elsewhere."""
    loose = {name for name, make in METHODS.items() if make().convergence_order is None}
    assert loose - {"auto", "ode", "torchdiffeq", "rk45"} <= set(TABLE) | set(ELSEWHERE)


def slope(values):
    """log2 of the ratio of two errors."""
    return math.log2(abs(values[0]) / abs(values[1]))


def cases():
    """Every method on every process; two processes where only sigma/alpha enters, or many steps are needed."""
    for name, (_, limit, sampler) in TABLE.items():
        few = isinstance(sampler, (Multistep, StochasticHeun)) or limit is of_corrector
        for sde in (PROCESSES[0], PROCESSES[2]) if few else PROCESSES:
            yield pytest.param(name, sde, id=f"{name}-{type(sde).__name__}")


@pytest.mark.parametrize(("name", "sde"), list(cases()))
def test_weak_order(name, sde):
    """The errors of mean and variance fall with the weak order, within 0.25; the mean may also be exact at once."""
    order, limit, sampler = TABLE[name]
    model = Gaussian(sde)
    errors = []
    for n in STEPS if limit is of_data else (160, 320):  # Langevin steps take a while to settle
        times = middle(sde, n)
        expected = limit(model, float(times[-1]), sampler)
        errors.append([got - want for got, want in zip(law(sampler, model, times), expected, strict=True)])
    means, variances = zip(*errors, strict=True)
    assert slope(variances) == pytest.approx(order, abs=0.25)
    assert max(map(abs, means)) < 1e-11 or slope(means) > order - 0.25


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=lambda s: type(s).__name__)
def test_third_order_of_er_sde(sde):
    """With three nodes the error is far below that with two, although second order in the end as well."""
    model = Gaussian(sde)
    for n in STEPS:
        times = middle(sde, n)
        exact = model.moments(float(times[-1]))[1]
        two, three = (law(s, model, times)[1] - exact for s in (TABLE["er-sde-2"][2], METHODS["er-sde"]()))
        assert abs(three) < abs(two) / 20


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
def test_every_eta_has_the_same_marginals(sde):
    """Euler-Maruyama with noise 0, 0.5 and 1 ends at one variance; a chain without its score's share of eta would not."""
    model = Gaussian(sde)
    times = middle(sde, 400)
    exact = model.moments(float(times[-1]))[1]
    for eta in (0.0, 0.5, 1.0):
        assert law(EulerMaruyama(eta), model, times)[1] == pytest.approx(exact, rel=0.02)


def test_the_noise_of_edm_is_inflated_by_what_was_asked():
    """With k = churn per log r, s_noise > 1 leaves (s_noise^2 - 1) V (1 - (V/V_start)^k) too much variance, V = c^2 + r^2.

    Per unit of log r it adds 2 k r^2 (s_noise^2 - 1), and the flow, run over 1 + k, takes 2 (1 + k) r^2 / V of it away.
    """
    sde, s_noise, churn = VESDE(), 1.05, 4.0
    model, times = Gaussian(sde), middle(sde, 500)
    k = churn / math.log(HIGH / LOW)
    start, end = STD**2 + HIGH**2, STD**2 + LOW**2
    got = law(StochasticHeun(churn, 0.0, 10.0, s_noise), model, times)[1]
    assert got - end == pytest.approx((s_noise**2 - 1) * end * (1 - (end / start) ** k), rel=0.02)


# -- exact cases -----------------------------------------------------------------------------------------------------

POINT_EXACT = {
    **{f"tau = {tau}, {k}": Multistep(Data(Tau(tau)), k) for tau in (0.0, 0.4, 1.0, 1.7) for k in (1, 2, 3)},
    "tau in a window": Multistep(Data(Tau(1.0, 0.2, 0.9)), 3, corrector=3),
    **{f"er-sde-{k}": Multistep(Data(ErSde()), k, variable="ratio") for k in (1, 2, 3)},
    **{name: METHODS[name]() for name in ("ancestral", "sde-dpm++2m", "sde-dpm++3m", "sa-solver", "er-sde")},
    "ddim, eta = 0.5": DDIM(0.5),
    "edm": StochasticHeun(8.0, 0.0, 10.0, 1.0),
}


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", POINT_EXACT)
def test_data_in_one_point_is_exact(name, steps):
    """With D constant nothing is left to interpolate: mean alpha_s mu and variance sigma_s^2 at any step size."""
    for sde in PROCESSES:
        model = Gaussian(sde, std=0.0)
        times = torch.cat([middle(sde, 1)[:1], middle(sde, 11)[[2, 3, 7, 8]][: steps - 1], middle(sde, 1)[1:]])
        expected = model.moments(float(times[-1]))
        assert law(POINT_EXACT[name], model, times) == pytest.approx(expected, rel=1e-10)


def test_the_wrong_variance_is_found():
    """The larger variance of the ancestral sampler is not exact for a point: 0.15^2 / 1.5^2 of it would be right."""
    times = middle(VESDE(), 1)
    assert law(Ancestral("large"), Gaussian(VESDE(), std=0.0), times)[1] > 50 * LOW**2


def test_a_step_to_the_data_itself():
    """Multistep methods with noise end at sigma = 0 without noise, in the point."""
    sde = VPSDE(t_min=0.0)
    model = Gaussian(sde, std=0.0)
    for phi in (Tau(), Tau(1.0, 0.05, 1.0), ErSde()):
        mean, variance = law(Multistep(Data(phi), 3), model, uniform_log_snr(sde, 5))
        assert mean == pytest.approx(MEAN, rel=1e-12)
        assert variance < 1e-20


@pytest.mark.parametrize(
    "options",
    [
        dict(order=1),
        dict(order=2, pair="midpoint"),
        dict(order=2, corrector=3),
        dict(order=3),
        dict(order=3, variable="ratio"),
    ],
    ids=str,
)
def test_no_noise_is_the_deterministic_method(options, ring8, sde):
    """tau = 0 gives the data prediction method bit for bit, whatever the window, and is of known order."""
    model = ring8.diffuse(sde)
    expected = sample(model, (8, 2), method=Multistep("data", **options), steps=7, seed=0)
    for tau in (Tau(0.0), Tau(0.0, 0.05, 1.0)):
        sampler = Multistep(Data(tau), **options)
        assert torch.equal(sample(model, (8, 2), method=sampler, steps=7, seed=0), expected)
        assert sampler.convergence_order == Multistep("data", **options).convergence_order
    noisy = sample(model, (8, 2), method=Multistep(Data(Tau(0.1)), **options), steps=7, seed=0)
    assert not torch.equal(noisy, expected)


def test_no_churn_is_heun(ring8, sde):
    """s_churn = 0, or a window that no level lies in, is Heun bit for bit."""
    model = ring8.diffuse(sde)
    expected = sample(model, (8, 2), method=Heun(), steps=9, seed=0)
    for sampler in (StochasticHeun(s_churn=0.0), StochasticHeun(s_min=1e4, s_max=2e4)):
        assert torch.equal(sample(model, (8, 2), method=sampler, steps=9, seed=0), expected)
    assert not torch.equal(sample(model, (8, 2), method=StochasticHeun(), steps=9, seed=0), expected)


def test_eta_zero_is_the_flow():
    """Euler-Maruyama without noise is Euler on the flow, x + (s - t) velocity; so is FlowEuler where alpha is linear."""
    pair = torch.tensor([0.9, 0.3], dtype=torch.float64), torch.tensor([0.8, 0.25], dtype=torch.float64)
    t, s = pair
    for sde in (VPSDE(), RectifiedFlow()):
        rate = (s - t) * sde.sigma_dot(t) / sde.sigma(t)
        euler = 1 + rate, (s - t) * sde.alpha_dot(t) - rate * sde.alpha(t), torch.zeros_like(t)
        for a, b in zip(EulerMaruyama(0.0).coefficients(sde, *pair), euler, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        a, b, _ = FlowEuler().coefficients(sde, *pair)
        torch.testing.assert_close(a, euler[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(a * sde.alpha(t) + b, sde.alpha(s), rtol=1e-12, atol=1e-14)
    for a, b in zip(FlowEuler().coefficients(sde, *pair), euler, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_no_corrector_is_the_predictor(ring8):
    """PredictorCorrector(p, None) is p, and its table and grid are p's."""
    model = ring8.diffuse(VPSDE())
    for predictor in (Ancestral(), DDIM(0.5), EulerMaruyama(), Heun(), ReverseDiffusion()):
        a, b = (
            sample(model, (4, 2), method=m, steps=6, seed=3, denoise_final=False)
            for m in (predictor, PredictorCorrector(predictor, None))
        )
        assert torch.equal(a, b)


@pytest.mark.parametrize("snr", [0.05, 0.16, 0.4])
def test_langevin_settles_at_a_known_variance(snr):
    """sigma^2 / (1 - snr^2) on a Gaussian of variance sigma^2: 2.6 % too much at 0.16; `steps` repeats one step."""
    model = Gaussian(VESDE(), std=0.0)
    sigma = float(model.sde.sigma(0.5))
    corrector = Langevin(snr, steps=math.ceil(3 / snr**2))
    solved = exact_law(lambda x, z: corrector.correct(model, x, 0.5, 1.0, sigma, z), MEAN, 5 * sigma**2)
    assert solved == pytest.approx((MEAN, sigma**2 / (1 - snr**2)), rel=1e-4)
    if snr == 0.16:
        assert solved[1] / sigma**2 == pytest.approx(1.026, abs=5e-4)


def test_annealed_langevin_is_langevin_level_after_level():
    """Algorithm 1 of Song & Ermon 2019: steps of size 2 snr^2 sigma_i^2 at every level but the first."""
    sde = VESDE()
    model, times, noise = Gaussian(sde), uniform_log_snr(sde, 6), Given(6 * 3)
    x = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    got = run(AnnealedLangevin(3, 0.2), model, x, times, noise, denoise_final=False)
    draws = iter(noise.values)
    for t in times[1:].tolist():
        sigma = float(sde.sigma(t))
        e = 2 * 0.2**2 * sigma**2
        for _ in range(3):
            score = (model.denoise(x, t) - x) / sigma**2
            x = x + e * score + math.sqrt(2 * e) * next(draws)
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


# -- formulas of the literature --------------------------------------------------------------------------------------


class Given:
    """Noise made beforehand, for two rows of one number."""

    def __init__(self, draws):
        self.values = torch.randn(draws, 2, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.left = iter(self.values)

    def normal(self, shape, dtype):
        return next(self.left).clone()


class Wave(ScoreModel):
    """A denoiser that is neither affine in x nor constant in t."""

    def __init__(self, sde):
        super().__init__()
        self.sde = sde

    def denoise(self, x, t, cond=None):
        return torch.tanh(x / (1 + float(self.sde.sigma(t)))) + 0.3 * float(self.sde.alpha(t))


START = torch.tensor([[1.4], [-0.8]], dtype=torch.float64)


@pytest.mark.parametrize("sde", [VESDE(0.002, 80.0), EDMSDE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("churn", [0.0, 3.0, 100.0])
def test_edm_is_algorithm_2(sde, churn):
    """Karras et al. 2022, algorithm 2, line by line; N of gamma counts the steps before the final denoiser."""
    model, times, n, noise = Wave(sde), karras(sde, 9), 9, Given(9)
    levels, s_min, s_max, s_noise = sde.sigma(times).tolist(), 0.05, 20.0, 1.003
    got = run(StochasticHeun(churn, s_min, s_max, s_noise), model, 80 * START, times, noise)
    x, draws = 80 * START, iter(noise.values)
    for t, following in zip(levels, [*levels[1:], 0.0], strict=True):
        gamma = min(churn / n, math.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * s_noise * next(draws) if gamma else x
        d = (x_hat - model.denoise(x_hat, sde.time(-2 * math.log(t_hat)).clamp(0, 1))) / t_hat
        x = x_hat + (following - t_hat) * d
        if following:
            d_next = (x - model.denoise(x, sde.time(-2 * math.log(following)).clamp(0, 1))) / following
            x = x_hat + (following - t_hat) * (0.5 * d + 0.5 * d_next)
    torch.testing.assert_close(got, x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
def test_sde_dpm_solver_2m(sde):
    """SDE-DPM-Solver++ (2M) of Lu et al. 2022b: e^-h, 1 - e^-2h, the slope through two data predictions, and the noise."""
    model, times, noise = Wave(sde), middle(sde, 12)[[0, 1, 3, 4, 8, 12]], Given(5)
    got = run(METHODS["sde-dpm++2m"](), model, START, times, noise)
    x, lam = START, [0.5 * float(sde.log_snr(t)) for t in times]
    before = None
    for i, z in enumerate(noise.values):
        t, s = times[i], times[i + 1]
        h = lam[i + 1] - lam[i]
        denoised = model.denoise(x, t)
        step = 1 - math.exp(-2 * h)
        keep = float(sde.sigma(s) / sde.sigma(t)) * math.exp(-h)
        total = denoised if before is None else denoised + 0.5 * (denoised - before) * h / (lam[i] - lam[i - 1])
        x = keep * x + float(sde.alpha(s)) * step * total + float(sde.sigma(s)) * math.sqrt(step) * z
        before = denoised
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
def test_er_sde(sde, order):
    """ER-SDE-Solver of Cui et al. 2023, orders 1 and 2, in lambda = sigma/alpha with phi = lambda (e^(lambda^0.3) + 10)."""

    def phi(r):
        return r * (math.exp(r**0.3) + 10)

    model, times, noise = Wave(sde), middle(sde, 12)[[0, 1, 3, 4, 8, 12]], Given(5)
    got = run(Multistep(Data(ErSde()), order, variable="ratio"), model, START, times, noise)
    x, r = START, [float(sde.sigma(t) / sde.alpha(t)) for t in times]
    before = None
    for i, z in enumerate(noise.values):
        (a, b), ratio = (r[i], r[i + 1]), phi(r[i + 1]) / phi(r[i])
        denoised = model.denoise(x, times[i])
        y = ratio * x / float(sde.alpha(times[i])) + (1 - ratio) * denoised
        if order == 2 and before is not None:
            slope = (denoised - before) / (a - r[i - 1])
            y = y + (b - a + phi(b) * quad(lambda v: 1 / phi(v), b, a, epsabs=1e-13)[0]) * slope
        x = float(sde.alpha(times[i + 1])) * (y + math.sqrt(b**2 - (a * ratio) ** 2) * z)
        before = denoised
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-11)


def test_torchsde_is_euler_maruyama():
    """By Euler's scheme it is our own Euler-Maruyama, driven by the increments of its Brownian path: so is its law."""
    sde = VPSDE()
    model, times = Wave(sde), middle(sde, 7)
    t, s = float(times[0]), float(times[-1])
    got = run(TorchSDE(), model, START, times, RandomSource(3, "cpu", 2), denoise_final=False)
    path = BrownianPath((2, 1), RandomSource(3, "cpu", 2), s, t, dtype=torch.float64)

    class Increments:
        pairs = iter(zip(times[:-1].tolist(), times[1:].tolist(), strict=True))

        def normal(self, shape, dtype):
            a, b = next(self.pairs)
            return path.increment(a, b) / math.sqrt(a - b)

    expected = run(EulerMaruyama(), model, START, times, Increments(), denoise_final=False)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


# -- few steps -------------------------------------------------------------------------------------------------------

STOCHASTIC = [
    *("pc", "euler", "reverse-diffusion", "ancestral", "langevin", "edm", "sde-dpm++2m", "sde-dpm++3m", "sa-solver"),
    *("er-sde", "sde", EulerMaruyama(0.5), DDIM(0.5), DDIM(1.0), Ancestral("large"), PredictorCorrector(Ancestral())),
    *(PredictorCorrector(DDIM(0.5), Langevin(rule="norm")), StochasticHeun(1e3, 0.0, 1e9, 1.0)),
]


@pytest.mark.parametrize("method", STOCHASTIC, ids=lambda m: m if isinstance(m, str) else type(m).__name__)
def test_fewer_steps_than_beta(method, ring8):
    """1 to 5 steps of VP are finite for every method, although beta(t)/N exceeds 1 there and sqrt(1 - beta) is NaN."""
    sde = VPSDE()
    model = ring8.diffuse(sde)
    for steps in (1, 2, 3, 5):
        published = torch.sqrt(1 - sde.diffusion(torch.tensor(1.0)) ** 2 / steps)
        assert torch.isnan(published)
        assert torch.isfinite(sample(model, (16, 2), method=method, steps=steps, seed=0)).all()


def test_the_law_of_a_mixture(ring8):
    """The affine laws above are those of the package's own model: a chain on one component gives the same numbers."""
    sde = VESDE()
    mixture = GaussianMixture.isotropic([[MEAN]], STD).diffuse(sde)
    mixture.moments = Gaussian(sde).moments
    for sampler in (EulerMaruyama(), METHODS["sa-solver"]()):
        expected = law(sampler, Gaussian(sde), middle(sde, 6))
        assert law(sampler, mixture, middle(sde, 6)) == pytest.approx(expected, rel=1e-9)
