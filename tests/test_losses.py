"""Losses: weightings by their definitions, laws of t by their distributions, one minimum for three objectives."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from scoresde import VESDE, VPSDE, GaussianMixture, RectifiedFlow, ScoreModel, ScoreNet, SubVPSDE, denoising_loss
from scoresde.losses import (
    TIME_SAMPLING,
    WEIGHTINGS,
    draw_times,
    explicit_loss,
    mean_weight,
    sliced_loss,
    weight,
)
from scoresde.rng import RandomSource
from scoresde.sde import expand

EARLY = VPSDE(t_min=0.02)  # where the likelihood weighting has a moderate variance under uniform times


def wrong_model(sde):
    """A model whose data sit elsewhere, so that its error has a size at every t."""
    return GaussianMixture([0.5, 0.5], [[0.6, 0.0], [-0.2, 0.4]], [[[0.3, 0.1], [0.1, 0.2]]] * 2).diffuse(sde)


def replay(sde, x0, law, seed):
    """The t, density ratio and noise that denoising_loss draws for this seed, and x_t."""
    source = RandomSource(seed, "cpu", x0.shape[0])
    t, ratio = draw_times(sde, x0.shape[0], law, source)
    eps = source.normal(x0.shape, x0.dtype)
    return t, ratio, eps, sde.perturb(x0, t, eps)


@pytest.mark.parametrize("law", TIME_SAMPLING)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings_by_their_definitions(sde, full3, weighting, law):
    """Each weighting computed as its paper writes it, on the score or on the denoiser."""
    model = GaussianMixture.isotropic([[0.5, 0.0, 0.3]], 0.6).diffuse(sde)
    x0 = full3.sample(64, seed=1)
    t, ratio, _, x = replay(sde, x0, law, 5)
    alpha, sigma, g = sde.alpha(t), sde.sigma(t), sde.diffusion(t)
    # grad log p(x_t | x_0) and the denoiser's error
    conditional = -(x - expand(alpha, x) * x0) / expand(sigma**2, x)
    of_score = (model.score(x, t) - conditional).square().sum(1)
    of_denoiser = (model.denoise(x, t) - x0).square().sum(1)
    s, c = sigma / alpha, model.sigma_data
    expected = {
        "sigma2": sigma**2 * of_score,  # Song et al. 2021, section 3.3
        "likelihood": g**2 * of_score,  # Song, Durkan, Murray & Ermon 2021, equation 7
        "edm": (s**2 + c**2) / (s * c) ** 2 * of_denoiser,  # Karras et al. 2022, table 1
        "min-snr": (1 / s**2).clamp_max(5.0) * of_denoiser,  # Hang et al. 2023, equation 8
    }[weighting]
    got = denoising_loss(model, x0, weighting=weighting, time_sampling=law, seed=5)
    assert got.shape == (64,)
    inner = (s < 1e5) & (s > 1e-5)  # beyond, the denoiser's error itself has no digits left
    torch.testing.assert_close(got[inner], (ratio * expected)[inner], rtol=1e-5, atol=1e-10)


def test_importance_is_unbiased_and_has_less_variance():
    """The likelihood-weighted loss has the same mean under importance as under uniform times, with smaller variance."""
    data = GaussianMixture.isotropic([[0.3, -0.5], [-0.3, 0.5]], 0.3)
    model = wrong_model(EARLY)
    means = {}
    for law in ("uniform", "importance", "low-discrepancy"):
        means[law] = torch.stack(
            [
                denoising_loss(model, data.sample(64, seed=i), weighting="likelihood", time_sampling=law, seed=i).mean()
                for i in range(400)
            ]
        )
    for law in ("importance", "low-discrepancy"):
        gap = float(means[law].mean() - means["uniform"].mean())
        error = math.sqrt(float(means[law].var() + means["uniform"].var()) / 400)
        assert abs(gap) < 4 * error
    assert float(means["importance"].var()) < 0.5 * float(means["low-discrepancy"].var())
    assert float(means["low-discrepancy"].var()) < 0.9 * float(means["uniform"].var())


@pytest.mark.parametrize("weighting", ["sigma2", "edm", "min-snr"])
def test_importance_keeps_the_expectation_of_other_weightings(weighting):
    """Dividing by the density makes importance times fit any weighting."""
    data, model = GaussianMixture.isotropic([[0.3, -0.5]], 0.3), wrong_model(EARLY)
    x0 = data.sample(20_000, seed=0)
    a, b = (
        denoising_loss(model, x0, weighting=weighting, time_sampling=law, seed=3) for law in ("uniform", "importance")
    )
    error = math.sqrt(float(a.var() + b.var()) / 20_000)
    assert abs(float(a.mean() - b.mean())) < 4 * error


@pytest.mark.parametrize("log_snr_range", [None, (-3.0, 4.0)])
def test_importance_ratio_integrates_any_function(sde, log_snr_range):
    """mean(ratio h(t)) over stratified importance times is the mean of h over uniform times."""
    t, ratio = draw_times(sde, 20_000, "importance", RandomSource(0, "cpu", 20_000), log_snr_range)
    if log_snr_range is None:
        first, last = sde.t_min, sde.t_max
    else:
        first, last = sde.time(torch.tensor(log_snr_range[::-1], dtype=torch.float64)).tolist()
    assert first <= float(t.min()) < float(t.max()) <= last
    u = first + (last - first) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for h in (torch.ones_like, torch.cos, torch.square):
        assert float((ratio * h(t)).mean()) == pytest.approx(float(h(u).mean()), rel=2e-3)


def test_uniform_times(sde):
    """uniform fills [t_min, t_max] uniformly and independently."""
    t, ratio = draw_times(sde, 5000, "uniform", RandomSource(1, "cpu", 5000))
    assert torch.equal(ratio, torch.ones_like(t))
    unit = ((t - sde.t_min) / (sde.t_max - sde.t_min)).numpy()
    assert stats.kstest(unit, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("law", ["low-discrepancy", "importance"])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_stratified_times(sde, law, n):
    """One time in each n-th of the interval (of t, or of log-SNR): neighbours are exactly 1/n apart, on a circle."""
    t, _ = draw_times(sde, n, law, RandomSource(2, "cpu", n))
    if law == "importance":
        lam = sde.log_snr(torch.cat([t, torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)]))
        unit = (lam[:n] - lam[-1]) / (lam[-2] - lam[-1])
    else:
        unit = (t - sde.t_min) / (sde.t_max - sde.t_min)
    unit = unit.sort().values
    gaps = torch.diff(torch.cat([unit, unit[:1] + 1]))
    torch.testing.assert_close(gaps, torch.full((n,), 1 / n, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("law", ["low-discrepancy", "importance"])
def test_stratified_times_are_uniform_each(law):
    """Over seeds, the first time of a stratified batch follows the law itself."""
    sde = VPSDE()
    t = torch.stack([draw_times(sde, 4, law, RandomSource(i, "cpu", 4))[0] for i in range(2000)])
    for column in (0, 3):
        if law == "importance":
            ends = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))
            unit = (sde.log_snr(t[:, column]) - ends[0]) / (ends[1] - ends[0])
        else:
            unit = (t[:, column] - sde.t_min) / (sde.t_max - sde.t_min)
        assert stats.kstest(unit.numpy(), "uniform").pvalue > 1e-3


def test_log_normal_law(sde):
    """log(sigma/alpha) follows N(-1.2, 1.2^2) (Karras et al. 2022, table 1), cut at the ends of the schedule."""
    t, ratio = draw_times(sde, 20_000, "log-normal", RandomSource(4, "cpu", 20_000))
    assert torch.equal(ratio, torch.ones_like(t))
    assert sde.t_min <= float(t.min()) < float(t.max()) <= sde.t_max
    low, high = (-0.5 * sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64))).tolist()
    mean, std = -1.2, 1.2
    law = stats.truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)
    log_s = (-0.5 * sde.log_snr(t)).numpy()
    assert stats.kstest(log_s, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("law", TIME_SAMPLING)
def test_log_snr_range_is_kept(sde, law):
    """log_snr_range narrows every law to these log-SNRs."""
    t, _ = draw_times(sde, 500, law, RandomSource(0, "cpu", 500), (-2.0, 1.0))
    lam = sde.log_snr(t)
    assert -2 - 1e-6 <= float(lam.min()) < -1.5
    assert 0.5 < float(lam.max()) <= 1 + 1e-6


class Linear(nn.Module):
    """score = W x + b with theta = (W, b) in one vector of 6."""

    theta = torch.zeros(6, dtype=torch.float64)

    def forward(self, x, label):
        return x @ self.theta[:4].reshape(2, 2).T + self.theta[4:]


def minimum(net, loss):
    """The minimiser of a quadratic loss(theta), by one Newton step from 0."""

    def at(theta):
        net.theta = theta
        return loss().mean()

    zero = torch.zeros(6, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(at, zero)
    gradient = torch.autograd.functional.jacobian(at, zero)
    return -torch.linalg.solve(hessian, gradient)


@pytest.mark.parametrize("make", [VPSDE, SubVPSDE, VESDE, RectifiedFlow])
def test_three_objectives_share_a_minimum(make):
    """Explicit, denoising and sliced score matching all find the score of a Gaussian, -(C_t)^-1 (x - mean)."""
    sde, n = make(), 40_000
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    data = GaussianMixture([1.0], [[0.4, -0.6]], cov[None])
    t = float(sde.time(0.0))  # as much noise as signal
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    precision = torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(2, dtype=torch.float64))
    truth = torch.cat([-precision.flatten(), alpha * precision @ data.mean])

    net = Linear()
    model = ScoreNet(net, sde, "score")
    x0 = data.sample(n, seed=0)
    x = sde.perturb(x0, t, torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    exact = data.diffuse(sde).score(x, t)
    scale = float(truth.abs().max())
    got = minimum(net, lambda: explicit_loss(model, x, t, exact))
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-9 * scale)
    got = minimum(net, lambda: denoising_loss(model, x0, seed=2, time_sampling="uniform", log_snr_range=(-1e-9, 1e-9)))
    torch.testing.assert_close(got, truth, rtol=0, atol=0.03 * scale)
    got = minimum(net, lambda: sliced_loss(model, x, t, seed=3))
    torch.testing.assert_close(got, truth, rtol=0, atol=0.05 * scale)


def test_sliced_loss_equals_its_formula():
    """For score = W x + b the loss is v^T W v + (v^T (W x + b))^2 / 2 with the seed's v; it trains through."""
    net = Linear()
    net.theta = torch.tensor([-1.0, 0.3, 0.1, -2.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    model = ScoreNet(net, VPSDE(), "score")
    x = torch.tensor([[0.3, -0.2], [1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    v = RandomSource(7, "cpu", 3).normal((3, 2), torch.float64)
    matrix = net.theta[:4].reshape(2, 2)
    expected = (v @ matrix * v).sum(1) + 0.5 * ((x @ matrix.T + net.theta[4:]) * v).sum(1) ** 2
    got = sliced_loss(model, x, 0.5, seed=7)
    torch.testing.assert_close(got, expected)
    (a,) = torch.autograd.grad(got.sum(), net.theta)
    (b,) = torch.autograd.grad(expected.sum(), net.theta)
    torch.testing.assert_close(a, b)


def test_explicit_loss_equals_its_formula(ring8):
    """Half the squared distance of the scores; the exact model scores 0."""
    model, x = ring8.diffuse(VPSDE()), ring8.sample(4, seed=0)
    score = model.score(x, 0.3)
    assert torch.equal(explicit_loss(model, x, 0.3, score), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(explicit_loss(model, x, 0.3, score + 2), torch.full((4,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("law", TIME_SAMPLING)
def test_the_exact_model_has_the_smallest_loss(ring8, weighting, law):
    """No weighting or law prefers a scaled or shifted denoiser to the posterior mean."""
    exact = ring8.diffuse(EARLY)

    class Off(type(exact)):
        def noise(self, x, t, cond=None):
            return self.factor * super().noise(x, t) + self.shift

    x0 = ring8.sample(2000, seed=0)
    best = denoising_loss(exact, x0, weighting=weighting, time_sampling=law, seed=1).mean()
    for factor, shift in ((0.8, 0.0), (1.2, 0.0), (1.0, 0.3)):
        off = Off(ring8, EARLY)
        off.factor, off.shift = factor, shift
        assert denoising_loss(off, x0, weighting=weighting, time_sampling=law, seed=1).mean() > best


def test_loss_depends_on_the_data_only_through_rows(full3):
    """One seed per example under the uniform law: an example's loss does not depend on its batch."""
    model, x0 = full3.diffuse(VPSDE()), full3.sample(6, seed=0)
    whole = denoising_loss(model, x0, time_sampling="uniform", seed=list(range(6)))
    part = denoising_loss(model, x0[2:4], time_sampling="uniform", seed=[2, 3])
    torch.testing.assert_close(part, whole[2:4], rtol=1e-9, atol=0)


def test_elbo_of_the_exact_model_is_the_entropy():
    """Half the likelihood-weighted loss plus the entropy of the noise at t_min is E[-log p] when the score is exact."""
    data = GaussianMixture([0.5, 0.5], [[0.5, 0.0], [-0.5, 0.0]], [[[0.2, 0.05], [0.05, 0.1]]] * 2)
    sde = VPSDE()
    model, n = data.diffuse(sde), 40_000
    x0 = data.sample(n, seed=0)
    loss = denoising_loss(model, x0, weighting="likelihood", time_sampling="importance", seed=1)
    constant = math.log(2 * math.pi * math.e) - float(sde.log_snr(sde.t_min))  # of reading x_0 off x at t_min, d = 2
    bound = constant + 0.5 * (sde.t_max - sde.t_min) * loss - (-data.log_prob(x0))
    # the noise at t_max is the prior's up to 1e-4 nats
    assert abs(float(bound.mean())) < 4 * float(bound.std()) / n**0.5 + 1e-3


def test_weights_at_hand_values():
    """w(t) of VP at t = 0.5, written out."""
    t = torch.tensor([0.5], dtype=torch.float64)
    b = 0.5 * 0.1 + 0.125 * 19.9
    variance, snr = 1 - math.exp(-b), math.exp(-b) / (1 - math.exp(-b))
    expected = {
        "sigma2": 1.0,
        "likelihood": (0.1 + 0.5 * 19.9) / variance,
        "edm": (1 / snr + 4.0) / 4.0,
        "min-snr": min(1.0, 5.0 / snr),
    }
    for name, value in expected.items():
        assert float(weight(VPSDE(), t, name, 2.0)) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_mean_weight_is_the_mean_factor(weighting):
    """By quadrature over uniform times, which importance times reproduce."""
    t = EARLY.t_min + (1 - EARLY.t_min) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    expected = float(weight(EARLY, t, weighting, 0.7).mean())
    for law in ("low-discrepancy", "importance"):
        assert mean_weight(EARLY, weighting, law, 0.7) == pytest.approx(expected, rel=5e-3)


def test_loss_on_each_device(ring8, device):
    """The loss is computed where the data are, for every law and weighting."""
    model, x0 = ring8.diffuse(VPSDE()).to(device), ring8.sample(8, seed=0, device=device)
    for law in TIME_SAMPLING:
        loss = denoising_loss(model, x0, weighting="likelihood", time_sampling=law, seed=0)
        assert loss.device.type == device
        assert torch.isfinite(loss).all()


def test_errors(ring8):
    """Empty batches, integer images, NaN, unknown names and empty ranges."""
    model, x0 = ring8.diffuse(VPSDE()), ring8.sample(4, seed=0)
    with pytest.raises(ValueError, match="empty"):
        denoising_loss(model, x0[:0])
    with pytest.raises(TypeError, match="floating"):
        denoising_loss(model, torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="sigma2, likelihood, edm, min-snr"):
        denoising_loss(model, x0, weighting="l2")
    with pytest.raises(ValueError, match="uniform, low-discrepancy, log-normal, importance"):
        denoising_loss(model, x0, time_sampling="cosine")
    with pytest.raises(ValueError, match="log_snr_range"):
        denoising_loss(model, x0, log_snr_range=(50.0, 60.0))
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4, 2\)"):
        explicit_loss(model, x0, 0.5, x0[:, :1])
    assert issubclass(type(model), ScoreModel)


def test_nan_in_the_data(ring8):
    """NaN in x0 is an error that names the rows, as the docstring says."""
    x0 = ring8.sample(4, seed=0)
    x0[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"x0.*\[2\]"):
        denoising_loss(ring8.diffuse(VPSDE()), x0, seed=0)


class Weighted(nn.Module):
    """A noise prediction that is one number times x, in a dtype of its own; keeps what it was given."""

    def __init__(self, dtype):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, x, label):
        self.seen = x.detach().clone()
        return self.gain * x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma_min=1e-4)], ids=lambda s: type(s).__name__)
def test_low_precision_data_get_all_of_the_noise(sde, dtype):
    """The noise on half-precision latents is that of the float32 latents, at every t; the loss is float32."""
    x0 = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    nets = Weighted(torch.float32), Weighted(torch.float32)
    losses = [denoising_loss(ScoreNet(net, sde), x, seed=0) for net, x in zip(nets, (x0, x0.float()), strict=True)]
    assert torch.equal(nets[0].seen, nets[1].seen)
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)
    half = Weighted(dtype)
    loss = denoising_loss(ScoreNet(half, sde), x0, seed=0)
    assert half.seen.dtype == dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses[1], rtol=0.02, atol=0.02)
    loss.mean().backward()
    assert half.gain.grad.dtype == dtype


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (0.0, float("nan")), (2.0, 1.0), (1.0,), (0.0, 1.0, 2.0)])
def test_ranges_of_log_snr_are_checked(bad):
    """NaN was ignored."""
    with pytest.raises(ValueError, match="log_snr_range"):
        denoising_loss(ScoreNet(Weighted(torch.float32), VPSDE()), torch.zeros(4, 2), seed=0, log_snr_range=bad)


def test_weights_that_are_no_numbers_are_refused():
    """An infinite weight would make the whole loss NaN or infinite."""

    class Starts(VPSDE):
        def diffusion(self, t):
            return torch.where(t < 0.5, torch.inf, super().diffusion(t))

    model = ScoreNet(Weighted(torch.float32), Starts())
    with pytest.raises(ValueError, match=r"'likelihood' is not finite for Starts at t = 0\."):
        denoising_loss(model, torch.zeros(4, 2), seed=0, weighting="likelihood")
    with pytest.raises(ValueError, match="sigma_data"):
        weight(VPSDE(), torch.tensor(0.5), "edm", math.nan)
