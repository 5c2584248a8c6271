"""Forward processes against the published formulas, written out again in 50-digit arithmetic."""

import math

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scoresde import (
    EDMSDE,
    METHODS,
    SDE,
    VESDE,
    VPSDE,
    CosineSDE,
    DiscreteVPSDE,
    GaussianMixture,
    RectifiedFlow,
    ScoreNet,
    SubVPSDE,
    denoising_loss,
    elbo,
    log_prob,
    sample,
)
from scoresde.sde import check_monotone

mp.mp.dps = 50
B0, B1 = mp.mpf(0.1), mp.mpf(20)
RATIO = mp.mpf(50) / mp.mpf(0.01)
TIMES = [1e-7, 1e-5, 1e-3, 0.1, 0.37, 0.5, 0.9, 1.0]


def vp(t):
    """alpha, sigma, f, g of Song et al. 2021, equations 32 and 33."""
    beta = B0 + t * (B1 - B0)
    b = t**2 * (B1 - B0) / 2 + t * B0
    return mp.exp(-b / 2), mp.sqrt(1 - mp.exp(-b)), -beta / 2, mp.sqrt(beta)


def sub_vp(t):
    """Song et al. 2021, equation 29 and the sub-VP line of appendix C."""
    beta = B0 + t * (B1 - B0)
    b = t**2 * (B1 - B0) / 2 + t * B0
    return mp.exp(-b / 2), 1 - mp.exp(-b), -beta / 2, mp.sqrt(beta * (1 - mp.exp(-2 * b)))


def ve(t):
    """Song et al. 2021, equations 30 and 31."""
    sigma = mp.mpf(0.01) * RATIO**t
    return mp.mpf(1), sigma, mp.mpf(0), sigma * mp.sqrt(2 * mp.log(RATIO))


@pytest.mark.parametrize(("sde", "formula"), [(VPSDE(), vp), (SubVPSDE(), sub_vp), (VESDE(), ve)])
@pytest.mark.parametrize("t", TIMES)
def test_published_closed_forms(sde, formula, t):
    """alpha, sigma, f and g to 12 digits at every t, t as small as 1e-7 included."""
    alpha, sigma, f, g = (float(v) for v in formula(mp.mpf(t)))
    assert float(sde.alpha(t)) == pytest.approx(alpha, rel=1e-12)
    assert float(sde.sigma(t)) == pytest.approx(sigma, rel=1e-12)
    assert float(sde.drift_scale(t)) == pytest.approx(f, rel=1e-12, abs=1e-300)
    assert float(sde.diffusion(t)) == pytest.approx(g, rel=1e-12)
    x = torch.tensor([[2.0, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(sde.drift(x, t), f * x, rtol=1e-12, atol=0)


def test_edm_cosine_and_rectified_flow_closed_forms():
    """EDM's time grid, Hoogeboom's cosine angle and the straight line, from their papers."""
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    torch.testing.assert_close(EDMSDE().sigma(t), (low + t * (high - low)) ** 7, rtol=1e-12, atol=0)
    # shifted cosine: log-SNR = -2 log tan(theta), theta linear between the angles of log-SNR 15 and -15
    first, last = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    expected = -2 * torch.log(torch.tan(first + t * (last - first)))
    torch.testing.assert_close(CosineSDE().log_snr(t), expected, rtol=1e-11, atol=1e-11)
    flow = RectifiedFlow()
    torch.testing.assert_close(flow.alpha(t), 1 - t)
    torch.testing.assert_close(flow.sigma(t), t)
    inner = t[1:-1]
    torch.testing.assert_close(flow.drift_scale(inner), -1 / (1 - inner))
    torch.testing.assert_close(flow.diffusion(inner) ** 2, 2 * inner / (1 - inner))


class Plain(SDE):
    """alpha and sigma of another process; everything else from the base class."""

    def __init__(self, of):
        self.of, self.t_min, self.t_max = of, of.t_min, of.t_max

    def alpha(self, t):
        return self.of.alpha(t)

    def sigma(self, t):
        return self.of.sigma(t)


@pytest.mark.parametrize("name", ["alpha_dot", "sigma_dot", "drift_scale", "diffusion", "log_snr"])
def test_overrides_agree_with_automatic_differentiation(sde, name):
    """Each closed form is what autograd derives from alpha and sigma."""
    t = torch.linspace(1e-4, 0.999, 200, dtype=torch.float64)
    torch.testing.assert_close(getattr(sde, name)(t), getattr(Plain(sde), name)(t), rtol=1e-10, atol=1e-10)


def test_closed_form_inverse_agrees_with_bisection(sde):
    """time(log-SNR) is the same by formula and by bisection."""
    t = torch.linspace(1e-4, 0.999, 101, dtype=torch.float64)
    lam = sde.log_snr(t)
    torch.testing.assert_close(sde.time(lam), Plain(sde).time(lam), rtol=0, atol=1e-12)


def test_time_inverts_log_snr(sde):
    """time(log_snr(t)) = t to 1e-9 on all of [0, 1], both ends included, and relative to t for small t."""
    small = torch.logspace(-7, -1, 61, dtype=torch.float64)
    t = torch.cat([torch.linspace(0, 1, 1001, dtype=torch.float64), small])
    torch.testing.assert_close(sde.time(sde.log_snr(t)), t, rtol=0, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(t=st.floats(0, 1), s=st.floats(0, 1))
def test_log_snr_is_monotone_between_any_two_times(t, s):
    """For any t < s the log-SNR does not increase (float64), for all processes."""
    t, s = min(t, s), max(t, s)
    for sde in (VPSDE(), SubVPSDE(), VESDE(), CosineSDE(), EDMSDE(), RectifiedFlow()):
        a, b = float(sde.log_snr(t)), float(sde.log_snr(s))
        assert math.isfinite(a)
        assert math.isfinite(b)
        assert a >= b
        if s - t > 1e-9:
            assert a > b


def test_log_snr_in_float32(sde):
    """Finite and strictly decreasing in float32 on [0, 1], ends included."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float32)
    lam = sde.log_snr(t)
    assert lam.dtype == torch.float32
    assert torch.isfinite(lam).all()
    assert (lam[1:] < lam[:-1]).all()


@pytest.mark.parametrize("t", [0.0, 1e-7, 1e-6, 1e-3, 0.5, 1.0])
def test_sigma_in_float32(sde, t):
    """sigma keeps its digits in float32 (1 - exp(-B) written naively is 0 at t = 1e-7 for VP)."""
    t32 = torch.tensor(t, dtype=torch.float32)
    got, exact = sde.sigma(t32), sde.sigma(t32.double())
    assert got.dtype == torch.float32
    assert torch.isfinite(got)
    torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=0)
    torch.testing.assert_close(sde.alpha(t32).double(), sde.alpha(t32.double()), rtol=3e-6, atol=1e-7)


def test_marginals_follow_the_forward_sde(sde):
    """alpha and sigma solve their moment equations: d alpha/dt = f alpha, d sigma^2/dt = 2 f sigma^2 + g^2."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    h = 1e-6
    slope = (sde.sigma(t + h) ** 2 - sde.sigma(t - h) ** 2) / (2 * h)
    f, g = sde.drift_scale(t), sde.diffusion(t)
    torch.testing.assert_close(slope, 2 * f * sde.sigma(t) ** 2 + g**2, rtol=1e-6, atol=1e-7)
    slope = (sde.alpha(t + h) - sde.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(slope, f * sde.alpha(t), rtol=1e-6, atol=1e-8)


class Mine(SDE):
    """A process of a user's own: alpha = exp(-4 t^2), sigma = t, and nothing else."""

    def alpha(self, t):
        return torch.exp(-4 * t**2)

    def sigma(self, t):
        return t


class MyNoise(SDE):
    """Another: the constant alpha gives autograd nothing to differentiate."""

    def alpha(self, t):
        return torch.ones_like(torch.as_tensor(t, dtype=torch.float64))

    def sigma(self, t):
        return 0.01 + 20 * torch.as_tensor(t, dtype=torch.float64) ** 2


@pytest.mark.parametrize("sde", [Mine(), MyNoise()], ids=["alpha-and-sigma", "constant-alpha"])
def test_user_defined_process(sde):
    """alpha and sigma alone are enough: every sampler draws the data's law and log_prob is right."""
    data = GaussianMixture.isotropic([[-0.5, 0.3], [0.5, -0.3]], 0.4)
    model = data.diffuse(sde)
    for method in METHODS:
        adaptive = METHODS[method]().nfe_per_step is None
        x = sample(model, (1000, 2), method=method, steps=1 if adaptive else 100, seed=1).double()
        if method == "langevin":  # five Langevin steps at each of 100 levels do not reach every level's law
            assert float((x.T.cov() - data.covariance).abs().max()) < 0.2
            continue
        torch.testing.assert_close(x.mean(0), data.mean, rtol=0, atol=5 * 0.65 / 1000**0.5)
        torch.testing.assert_close(x.T.cov(), data.covariance, rtol=0, atol=0.07)
    x = data.sample(32, seed=2)
    error = log_prob(model, x).value - model.log_prob(x, sde.t_min)
    assert float(error.abs().mean()) < 3e-3


def test_prior(sde):
    """The prior's log density is scipy's, its samples have its standard deviation, and a seed fixes them."""
    x = sde.prior_sample((4000, 2, 3), seed=5, dtype=torch.float64)
    assert x.shape == (4000, 2, 3)
    expected = stats.norm(scale=sde.prior_std).logpdf(x.numpy()).sum((1, 2))
    torch.testing.assert_close(sde.prior_log_prob(x), torch.from_numpy(expected), rtol=1e-12, atol=1e-10)
    assert float(x.std()) == pytest.approx(sde.prior_std, rel=5 / math.sqrt(2 * x.numel()))
    assert torch.equal(x, sde.prior_sample((4000, 2, 3), seed=5, dtype=torch.float64))
    assert sde.prior_sample((2, 2), seed=5).dtype == torch.float32
    assert sde.prior_log_prob(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("event", [(3,), (2, 5), (1, 4, 4), (1, 2, 3, 3)])
def test_perturb_row_by_row(sde, event):
    """x_t = alpha x_0 + sigma noise with every row at its own t, or all at one."""
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 5, *event, generator=g, dtype=torch.float64)
    t = torch.rand(5, generator=g, dtype=torch.float64)
    got = sde.perturb(x, t, z)
    for i in range(5):
        torch.testing.assert_close(got[i], float(sde.alpha(t[i])) * x[i] + float(sde.sigma(t[i])) * z[i])
    torch.testing.assert_close(sde.perturb(x, 0.3, z), sde.alpha(0.3) * x + sde.sigma(0.3) * z)
    assert sde.perturb(x.float(), t, z.float()).dtype == torch.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: VPSDE(beta_min=-0.1),
        lambda: VPSDE(beta_min=20.0, beta_max=0.1),
        lambda: SubVPSDE(beta_max=float("inf")),
        lambda: SubVPSDE(beta_min=float("nan")),
        lambda: VPSDE(t_min=1.0),
        lambda: VPSDE(t_min=-1e-3),
        lambda: VPSDE(t_min=float("nan")),
        lambda: VESDE(sigma_min=50.0, sigma_max=0.01),
        lambda: VESDE(sigma_min=1.0, sigma_max=1.0),
        lambda: VESDE(sigma_min=0.0),
        lambda: EDMSDE(sigma_min=-0.002),
        lambda: EDMSDE(rho=0.0),
        lambda: EDMSDE(t_min=2.0),
        lambda: CosineSDE(log_snr_min=15.0, log_snr_max=-15.0),
        lambda: CosineSDE(log_snr_max=float("inf")),
        lambda: RectifiedFlow(t_min=0.5, t_max=0.4),
        lambda: RectifiedFlow(t_max=1.5),
    ],
)
def test_bad_construction(make):
    """Impossible schedules are refused when they are made."""
    with pytest.raises(ValueError, match=r"must"):
        make()


@pytest.mark.parametrize("t", [-0.1, 1.0001, float("nan"), float("inf"), torch.tensor([0.5, float("nan")])])
def test_times_out_of_range(sde, t):
    """A t outside [0, 1], NaN included, is an error that says what t means."""
    for call in (sde.alpha, sde.sigma, sde.log_snr, sde.drift_scale, sde.diffusion):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call(t)


@pytest.mark.parametrize("t", [torch.tensor([0, 1]), "0.5", None, True])
def test_times_of_the_wrong_kind(sde, t):
    """Integer tensors, strings, None and booleans are no times."""
    with pytest.raises(TypeError, match="t must be"):
        sde.alpha(t)


def test_perturb_refuses_what_does_not_fit(sde):
    """Shapes of t and noise have to match the batch; nothing is broadcast."""
    x = torch.zeros(4, 2)
    for t in (torch.full((3,), 0.5), torch.full((4, 1), 0.5), torch.full((1,), 0.5)):
        with pytest.raises(ValueError, match=r"\(4,\)"):
            sde.perturb(x, t, x)
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4, 2\)"):
        sde.perturb(x, 0.5, torch.zeros(4, 1))
    with pytest.raises(TypeError, match="floating"):
        sde.perturb(torch.zeros(4, 2, dtype=torch.int64), 0.5, x)
    with pytest.raises(ValueError, match="batch"):
        sde.perturb(torch.zeros(4), 0.5, torch.zeros(4))


def test_on_each_device(sde, device):
    """Coefficients follow t's device, and equal the CPU's."""
    t = torch.linspace(0.01, 0.99, 11, dtype=torch.float64)
    for name in ("alpha", "sigma", "diffusion", "log_snr"):
        torch.testing.assert_close(
            getattr(sde, name)(t.to(device)).cpu(), getattr(sde, name)(t), rtol=1e-12, atol=1e-12
        )
    x = torch.ones(11, 2, device=device)
    assert sde.perturb(x, t.to(device), x).device.type == device


@pytest.mark.parametrize("form", ["tensors only", "constant", "ends in pure noise"])
def test_own_processes_may_be_written_for_tensors_alone(form, ring8):
    """alpha and sigma with torch functions, or a constant: numbers are converted around them, everywhere."""

    class Own(SDE):
        t_min, t_max = 1e-3, 0.999

        def alpha(self, t):
            return 1.0 if form == "constant" else torch.cos(1.5 * t) if form == "tensors only" else 1 - t

        def sigma(self, t):
            return torch.sin(1.5 * t) * (3.0 if form == "constant" else 1.0) if form != "ends in pure noise" else t

    model = ring8.diffuse(Own())
    assert Own().alpha(0.5).shape == ()
    assert Own().sigma(torch.tensor([0.1, 0.2])).shape == (2,)
    for method in METHODS:
        x = sample(model, (8, 2), method=method, steps=None if METHODS[method]().nfe_per_step is None else 20, seed=0)
        assert bool(torch.isfinite(x).all()), method
    assert bool(torch.isfinite(log_prob(model, ring8.sample(2, seed=0)).value).all())


class Bent(SDE):
    """A process whose sigma and alpha are whatever is asked for."""

    def __init__(self, alpha, sigma, t_min=1e-3):
        self.own, self.t_min = (alpha, sigma), t_min

    def alpha(self, t):
        return self.own[0](t)

    def sigma(self, t):
        return self.own[1](t)


class Zero(torch.nn.Module):
    """A denoiser that says 0."""

    def forward(self, x, label):
        return torch.zeros_like(x)


OF_TIME = ("alpha", "sigma", "alpha_dot", "sigma_dot", "half_variance_rate", "drift_scale", "diffusion", "log_snr")


class Mixin:
    """No SDE itself; its methods become one's."""

    def alpha(self, t):
        return torch.exp(-t)

    def log_snr(self, t):
        return -2 * (t + torch.log(torch.sqrt(t) + 0.1))


class Mixed(Mixin, SDE):
    def sigma(self, t):
        return torch.sqrt(t) + 0.1


@pytest.mark.parametrize("own", [Mine(), Mixed(), Bent(torch.cos, torch.sin)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", OF_TIME)
def test_own_processes_are_checked_like_the_built_in(own, name):
    """Numbers and tensors of any shape are taken by every function of time; integers and other times are refused."""
    function = getattr(own, name)
    assert function(0.5).dtype == torch.float64
    for shape in ((), (3,), (2, 1, 3), (0,)):
        t = torch.full(shape, 0.5)
        got = function(t)
        assert (got.shape, got.dtype) == (t.shape, t.dtype)
        torch.testing.assert_close(got, function(torch.tensor(0.5)).expand(shape))
    for t in (-0.1, 1.1, float("nan"), torch.tensor([0.5, 2.0]), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            function(t)
    for t in (torch.tensor([0, 1]), "0.5", None, True):
        with pytest.raises(TypeError, match="t must be"):
            function(t)
    assert function(0.5).shape == ()  # what failed before leaves nothing behind


def test_log_snrs_of_the_wrong_kind(sde):
    """Integers would be cut to times 0 and 1."""
    for own in (sde, Mine()):
        assert 0 < float(own.time(0)) < 1
        for bad in (torch.tensor([0, 1]), "0", None):
            with pytest.raises(TypeError, match="log-SNR must be"):
                own.time(bad)


def test_a_function_of_time_that_returns_another_shape():
    """Not a value per time: nothing is broadcast."""
    own = Bent(lambda t: torch.ones(3), lambda t: t)
    with pytest.raises(ValueError, match=r"Bent\.alpha\(t\) has shape \(3,\), expected \(5,\)"):
        own.alpha(torch.full((5,), 0.5))


def test_what_a_schedule_returns_may_be_written_to():
    """sigma = t hands out no memory of the caller's."""
    t = torch.full((2,), 0.5)
    Mine().sigma(t).mul_(3)
    assert t.tolist() == [0.5, 0.5]


BENT = {
    "sigma negative": (torch.cos, lambda t: t - 0.3),
    "sigma zero": (torch.cos, lambda t: (t - 0.5).clamp_min(0)),
    "sigma decreasing": (torch.ones_like, lambda t: 1.5 - t),
    "sigma with a dip": (torch.ones_like, lambda t: 0.1 + t - 0.4 * torch.exp(-(((t - 0.6) / 0.05) ** 2))),
    "sigma constant": (torch.ones_like, torch.ones_like),
    "alpha negative": (lambda t: 0.7 - t, lambda t: 0.1 + t),
    "alpha zero": (torch.zeros_like, lambda t: 0.1 + t),
    "alpha increasing": (lambda t: torch.exp(3 * t), lambda t: 0.1 + t),
    "alpha not finite": (lambda t: torch.where(t > 0.5, torch.nan, 1.0), lambda t: 0.1 + t),
}


@pytest.mark.parametrize("kind", BENT)
def test_processes_that_gain_signal_are_refused(kind, ring8):
    """By every sampler, on its own grid and a given one, by likelihoods, bounds and losses: with t and the values."""
    sde = Bent(*BENT[kind])
    model = ScoreNet(Zero(), sde, "denoise")
    x, said = torch.zeros(2, 2), r"Bent .*t = 0?\.?[0-9]"
    for method in METHODS:
        with pytest.raises(ValueError, match=said):
            sample(model, (2, 2), method=method, steps=4, seed=0)
    for call in (
        lambda: sample(model, (2, 2), method="ddim", grid=[1.0, 0.7, 0.2, 1e-3], seed=0),
        lambda: log_prob(model, x),
        lambda: elbo(model, x, seed=0),
        lambda: denoising_loss(model, x, seed=0),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_processes_that_end_in_nothing_or_in_all_noise_are_processes(sde):
    """sigma = 0 at the first time, alpha = 0 at the last, and every built-in from end to end, seen as a user's."""
    check_monotone(Bent(lambda t: 1 - t, lambda t: t, 0.0), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    close = torch.tensor([0.5, 0.5 - 1e-15, 0.5 - 2e-15, 0.1], dtype=torch.float64)
    for process in (sde, VPSDE(t_min=0.0), DiscreteVPSDE.linear()):
        seen = Bent(process.alpha, process.sigma)
        check_monotone(seen, torch.linspace(process.t_max, process.t_min, 1001, dtype=torch.float64))
        check_monotone(seen, close)
        check_monotone(seen, close[:1])


def test_a_process_whose_alpha_is_zero_at_t_max_is_named(ring8):
    """The grid is refused with what to do; NaN from a division is not blamed on the network."""

    class Pure(SDE):
        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return t

    for method in ("auto", "ddim", "dpm++2m", "dpm3", "heun"):
        with pytest.raises(ValueError, match="alpha is 0 at t_max"):
            sample(ring8.diffuse(Pure()), (2, 2), method=method, seed=0)
    with pytest.raises(ValueError, match="undefined for Pure"):
        sample(ring8.diffuse(Pure()), (2, 2), method="dpm++2m", grid=[1.0, 0.5, 0.1], seed=0)
