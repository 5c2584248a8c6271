"""QuantizedScoreNet against arbitrary-precision arithmetic and against densities that are known in closed form."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    CosineSDE,
    Exact,
    QuantizedScoreNet,
    RectifiedFlow,
    SubVPSDE,
    bits_per_dim,
    log_prob,
    sample,
)
from scoresde.nets import LeanUNet

SDES = [VPSDE(), SubVPSDE(), VESDE(), CosineSDE(), EDMSDE(), RectifiedFlow()]
LEVELS = 5
DTYPES = (torch.float32, torch.float64)


class FixedLogits(nn.Module):
    """A network that ignores its input: logits (levels * c, *size) for every example."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x, label, cond=None):
        return self.logits.expand(x.shape[0], *self.logits.shape)


class Mixer(nn.Module):
    """Logits that depend on every feature of the pixel and on the label, smoothly."""

    def __init__(self, channels, levels):
        super().__init__()
        g = torch.Generator().manual_seed(5)
        wide = QuantizedScoreNet.input_channels(channels)
        self.weight = nn.Parameter(0.3 * torch.randn(levels * channels, wide, generator=g))

    def forward(self, x, label, cond=None):
        shift = label.reshape(-1, *(1,) * (x.dim() - 1)).to(x.dtype)
        return torch.einsum("oi,bi...->bo...", self.weight, x + shift)


def fixed(sde, dtype=torch.float64, levels=LEVELS, shape=(1, 4), seed=0, spread=1.5, **options):
    """A model with fixed random logits for examples of `shape`, and log pi (levels, *shape) in float64."""
    g = torch.Generator().manual_seed(seed)
    c, *size = shape
    logits = spread * torch.randn(levels * c, *size, generator=g, dtype=torch.float64)
    model = QuantizedScoreNet(FixedLogits(logits.to(dtype)), sde, levels, **options)
    return model, logits.to(dtype).double().reshape(levels, *shape)


def posterior_of_a_pixel(x, alpha, sigma, logits, low, high):
    """(D, eps_hat) of one pixel with 60 digits: weights of the intervals and means of truncated normals."""
    with mpmath.workdps(60):
        x, alpha, sigma = mpmath.mpf(x), mpmath.mpf(alpha), mpmath.mpf(sigma)
        levels = len(logits)
        edges = [mpmath.mpf(low) + (mpmath.mpf(high) - mpmath.mpf(low)) * k / levels for k in range(levels + 1)]
        if alpha == 0:
            weights = [mpmath.exp(v) for v in logits]
            means = [(edges[k] + edges[k + 1]) / 2 for k in range(levels)]
        else:
            weights, means = [], []
            m, r = x / alpha, sigma / alpha
            for k, logit in enumerate(logits):
                a, b = (edges[k] - m) / r, (edges[k + 1] - m) / r
                z = mpmath.ncdf(-a) - mpmath.ncdf(-b) if a + b > 0 else mpmath.ncdf(b) - mpmath.ncdf(a)
                weights.append(mpmath.exp(logit) * z)
                means.append(m + r * (mpmath.npdf(a) - mpmath.npdf(b)) / z)
        d = mpmath.fsum(w * v for w, v in zip(weights, means, strict=True)) / mpmath.fsum(weights)
        return float(d), float((x - alpha * d) / sigma)


def reference(model, logits, x, t):
    """D and eps_hat of all entries of x (B, *) at one time, in arbitrary precision, from x's own digits."""
    alpha, sigma = float(model.sde.alpha(t)), float(model.sde.sigma(t))
    if x.dtype == torch.float32:  # the model computes with the rounded coefficients; so does the reference
        alpha, sigma = float(torch.tensor(alpha, dtype=x.dtype)), float(torch.tensor(sigma, dtype=x.dtype))
    flat = logits.reshape(logits.shape[0], -1)
    rows = [
        [posterior_of_a_pixel(float(v), alpha, sigma, flat[:, i].tolist(), *model.value_range) for i, v in enumerate(r)]
        for r in x.flatten(1)
    ]
    both = torch.tensor(rows, dtype=torch.float64)
    return both[..., 0].reshape(x.shape), both[..., 1].reshape(x.shape), alpha, sigma


def noisy(model, t, dtype, n=3, shape=(1, 4), seed=1):
    """x_t for x_0 uniform in the range of the data."""
    g = torch.Generator().manual_seed(seed)
    low, high = model.value_range
    x0 = low + (high - low) * torch.rand(n, *shape, generator=g, dtype=torch.float64)
    eps = torch.randn(n, *shape, generator=g, dtype=torch.float64)
    return (model.sde.alpha(t) * x0 + model.sde.sigma(t) * eps).to(dtype)


# -- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_denoiser_and_noise_are_the_exact_posterior_mean(sde, fraction):
    """D and eps_hat equal 60-digit arithmetic: to 1e-10 in the closed form, 1e-5 where the noise is wide."""
    t = sde.t_min + fraction * (1 - sde.t_min)
    model, logits = fixed(sde)
    x = noisy(model, t, torch.float64)
    d, eps, alpha, sigma = reference(model, logits, x, t)
    wide = sigma > 8 * model.width * alpha
    tolerance = 1e-5 if wide else 1e-10
    denoised, noise = model.predict(x, t)
    torch.testing.assert_close(denoised, d, atol=tolerance, rtol=tolerance)
    # near the data the rounding of x itself, 1e-16 / sigma, is in eps
    torch.testing.assert_close(noise, eps, atol=tolerance + 1e-15 / sigma, rtol=tolerance)
    torch.testing.assert_close(model.denoise(x, t), denoised)
    torch.testing.assert_close(model.noise(x, t), noise)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_float32_keeps_its_digits(sde, fraction):
    """In float32 the error is a few roundings of x: 1e-5 in D, and as much over sigma in eps_hat."""
    t = sde.t_min + fraction * (1 - sde.t_min)
    model, logits = fixed(sde, torch.float32)
    x = noisy(model, t, torch.float32)
    d, eps, _, sigma = reference(model, logits, x, t)
    denoised, noise = model.predict(x, t)
    assert denoised.dtype == noise.dtype == torch.float32
    torch.testing.assert_close(denoised.double(), d, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(noise.double(), eps, atol=1e-4 + 1e-6 / sigma, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_branches_meet(dtype):
    """Just below and just above a noise of 8 intervals, closed form and expansion agree."""
    sde = VESDE(sigma_min=0.01, sigma_max=50.0)
    model, _ = fixed(sde, dtype)
    x = noisy(model, 0.7, dtype)
    at = sde.time(torch.tensor(-2 * math.log(8 * model.width), dtype=torch.float64))
    below, above = model.predict(x, at - 1e-9), model.predict(x, at + 1e-9)
    # phi/Z - phi'/Z cancels to 1/8 of its size, hence the digits lost in float32
    tolerance = 2e-6 if dtype == torch.float64 else 2e-5
    assert float(sde.sigma(at - 1e-9)) < 8 * model.width < float(sde.sigma(at + 1e-9))
    torch.testing.assert_close(below[0], above[0], atol=4 * tolerance, rtol=0)
    torch.testing.assert_close(below[1], above[1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
@pytest.mark.parametrize("levels", [2, 17])
def test_levels_and_range(levels, value_range):
    """Other numbers of levels and other ranges, on images of two channels: level k of channel j is at k * c + j."""
    shape, t = (2, 2, 2), 0.2
    model, logits = fixed(CosineSDE(), levels=levels, shape=shape, value_range=value_range)
    x = noisy(model, t, torch.float64, n=2, shape=shape)
    d, eps, _, _ = reference(model, logits, x, t)
    torch.testing.assert_close(model.denoise(x, t), d, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(model.noise(x, t), eps, atol=1e-9, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    x=st.floats(-4, 4),
    s=st.floats(-8, 5).map(math.exp),
    logits=st.lists(st.floats(-6, 6), min_size=2, max_size=6),
)
def test_one_pixel_for_any_noise(x, s, logits):
    """Any pixel, inside the range of the data or far out of it, at any noise from 3e-4 to 150, in float64."""
    levels = len(logits)
    sde = VESDE(sigma_min=1e-4, sigma_max=200.0)
    t = sde.time(torch.tensor(-2 * math.log(s), dtype=torch.float64))
    sigma = float(sde.sigma(t))
    values = torch.tensor(logits, dtype=torch.float64)
    model = QuantizedScoreNet(FixedLogits(values[:, None]), sde, levels)
    got = [v.item() for v in model.predict(torch.tensor([[[x]]], dtype=torch.float64), t)]
    d, eps = posterior_of_a_pixel(x, 1.0, sigma, logits, -1.0, 1.0)
    wide = sigma > 8 * model.width
    # far out the logarithms of the tails, about (excess / sigma)^2 / 2, carry the rounding
    excess = max(0.0, abs(x) - 1) / sigma
    tolerance = 1e-5 * max(1, x * x) if wide else 1e-10 + 1e-15 * excess**3
    assert got[1] == pytest.approx(eps, abs=tolerance + 1e-15 / sigma, rel=1e-9)
    assert got[0] == pytest.approx(d, abs=tolerance * max(sigma, 1e-3) + 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_denoise_and_noise_belong_together(sde, dtype):
    """x = alpha D + sigma eps_hat at every t, and D stays within the range of the data."""
    model = QuantizedScoreNet(Mixer(2, LEVELS).to(dtype), sde, LEVELS)
    for t in [sde.t_min, 0.02, 0.3, 0.7, 1.0]:
        x = noisy(model, t, dtype, shape=(2, 3))
        with torch.no_grad():
            d, eps = model.predict(x, t)
        back = sde.alpha(t).to(dtype) * d + sde.sigma(t).to(dtype) * eps
        scale = max(1.0, float(x.abs().max()))
        torch.testing.assert_close(back, x, atol=50 * torch.finfo(dtype).eps * scale, rtol=0)
        assert float(d.abs().max()) <= 1 + 1e-5
        torch.testing.assert_close(model.score(x, t) * sde.sigma(t).to(dtype), -eps, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sde", [CosineSDE(), VESDE(), VPSDE()], ids=lambda s: type(s).__name__)
def test_one_time_per_example(sde):
    """A vector of times gives row by row what each time gives alone, on either side of the branch."""
    model = QuantizedScoreNet(Mixer(1, LEVELS).double(), sde, LEVELS)
    times = torch.tensor([sde.t_min, 0.2, 0.5, 0.99], dtype=torch.float64)
    x = noisy(model, 0.5, torch.float64, n=4)
    d, eps = model.predict(x, times)
    for i, t in enumerate(times):
        alone = model.predict(x[i : i + 1], float(t))
        torch.testing.assert_close(d[i : i + 1], alone[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(eps[i : i + 1], alone[1], atol=1e-9, rtol=1e-9)


# -- extreme inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_values_far_out_of_range_are_finite_and_denoised_into_it(sde, dtype):
    """Where x lies thousands of sigmas outside the data, D is the nearest value that the data can have."""
    model = QuantizedScoreNet(Mixer(1, LEVELS).to(dtype), sde, LEVELS)
    x = torch.tensor([-30.0, -2.0, -1.01, 1.01, 2.0, 30.0], dtype=dtype).reshape(6, 1, 1)
    for t in [sde.t_min, sde.t_min + 1e-4, 0.01, 0.1]:
        with torch.no_grad():
            d, eps = model.predict(x, t)
        assert bool(torch.isfinite(d).all())
        assert bool(torch.isfinite(eps).all())
        slack = 1e-5 if dtype == torch.float32 else 1e-10
        assert float(d.min()) >= -1 - 30 * slack
        assert float(d.max()) <= 1 + 30 * slack
        if float(sde.sigma(t) / sde.alpha(t)) < 1e-3:
            torch.testing.assert_close(d, x.sign(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_gradients_are_finite_everywhere(sde, dtype):
    """d(D, eps_hat)/dx and d/dparameters hold no NaN, from t_min to 1, inside the range, on an edge and outside."""
    model = QuantizedScoreNet(Mixer(1, LEVELS).to(dtype), sde, LEVELS)
    values = torch.tensor([-20.0, -1.5, -1.0, -0.2, 0.0, 0.6, 1.0, 3.0], dtype=dtype).reshape(8, 1, 1)
    for t in [sde.t_min, sde.t_min + 1e-5, 0.01, 0.2, 0.5, 0.9, 1.0]:
        for scale in (1.0, float(sde.sigma(t))):
            x = (scale * values).requires_grad_(True)
            for out in model.predict(x, t):
                grads = torch.autograd.grad(out.sum(), [x, *model.parameters()], retain_graph=True)
                for g in grads:
                    assert bool(torch.isfinite(g).all()), f"t={t}, scale={scale}: {g}"


def test_the_derivative_of_the_noise_is_right():
    """Automatic differentiation agrees with central differences: what the trace of the likelihood rests on."""
    model = QuantizedScoreNet(Mixer(1, LEVELS).double(), CosineSDE(), LEVELS)
    for t in [0.02, 0.1, 0.4, 0.8, 0.97, 1.0]:
        x = noisy(model, t, torch.float64, n=2, shape=(1, 3))
        step = 1e-5 * float(CosineSDE().sigma(t))
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        _, slope = torch.func.jvp(lambda u, t=t: model.noise(u, t), (x,), (v,))
        difference = (model.noise(x + step * v, t) - model.noise(x - step * v, t)) / (2 * step)
        torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


def test_sample_ends_on_the_levels_that_the_logits_allow():
    """With all probability on two levels per pixel, a few DDIM steps end inside those two intervals."""
    logits = torch.full((LEVELS, 6), -40.0)
    logits[1], logits[3] = 0.0, 1.0
    model = QuantizedScoreNet(FixedLogits(logits), CosineSDE(-10.0, 16.0), LEVELS, event_shape=(1, 6))
    x = sample(model, (64, 1, 6), method="ddim", steps=30, seed=0)
    level = ((x + 1) / 2 * LEVELS).floor()
    assert bool(((level == 1) | (level == 3)).float().mean() > 0.995)
    share = float((level == 3).float().mean())
    p = 1 / (1 + math.exp(-1))
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 384)


# -- likelihood ------------------------------------------------------------------------------------------------------


def log_density_of_pixels(model, logits, x):
    """The exact log p_{t_min}(x) of independent pixels: steps of height pi_k / width, scaled, blurred by sigma."""
    sde = model.sde
    alpha, sigma = sde.alpha(sde.t_min), sde.sigma(sde.t_min)
    low, high = model.value_range
    edges = torch.linspace(low, high, model.levels + 1, dtype=torch.float64).reshape(-1, *(1,) * x.dim())
    cdf = torch.special.ndtr((x.double()[None] - alpha * edges) / sigma)
    p = (logits.softmax(0)[:, None] * (cdf[:-1] - cdf[1:])).sum(0) / (alpha * model.width)
    return p.log().flatten(1).sum(1)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1, 2)], ids=["1D", "2D"])
@pytest.mark.parametrize(
    "sde",
    [CosineSDE(-18.0, 9.0), VPSDE(0.1, 36.0, t_min=1e-3), EDMSDE(0.01, 2e4)],
    ids=lambda s: type(s).__name__,
)
def test_log_prob_is_the_known_density(sde, shape):
    """Constant logits are independent pixels, whose diffused density is elementary: log_prob meets it to 2e-3 nats."""
    model, logits = fixed(sde, shape=shape, spread=1.0)
    x = noisy(model, sde.t_min, torch.float64, n=4, shape=shape)
    result = log_prob(model, x, divergence=Exact(), rtol=1e-6, atol=1e-6)
    assert result.status.tolist() == [0] * 4
    torch.testing.assert_close(result.value, log_density_of_pixels(model, logits, x), atol=2e-3, rtol=0)


def test_log_prob_of_the_rectified_flow_whose_alpha_vanishes():
    """alpha = 0 at t = 1 breaks neither the value nor the trace."""
    sde = RectifiedFlow(t_min=5e-3)
    model, logits = fixed(sde, shape=(1, 2), spread=1.0)
    x = noisy(model, sde.t_min, torch.float64, n=4, shape=(1, 2))
    result = log_prob(model, x, divergence=Exact(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.value, log_density_of_pixels(model, logits, x), atol=2e-3, rtol=0)


def test_bits_per_dim_is_the_cross_entropy():
    """Levels drawn from the pixels' own probabilities cost what their logarithms say, example by example."""
    model, logits = fixed(CosineSDE(-18.0, 13.0), torch.float32, shape=(1, 4), spread=1.0)
    log_pi = logits.log_softmax(0).reshape(LEVELS, -1)
    u = torch.rand(50, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    k = (u[None] > log_pi.exp().cumsum(0)[:, None]).sum(0).clamp_max(LEVELS - 1)
    expected = -log_pi[k, torch.arange(4)].mean(1) / math.log(2)
    result = bits_per_dim(model, k[:, None], divergence=Exact(), rtol=1e-5, atol=1e-5, seed=1)
    assert abs(result.mean - float(expected.mean())) < 1e-2
    # an example differs only where dequantization put it within the blur, 0.4 % of a level, of an edge
    assert float((result.per_example - expected).abs().median()) < 2e-3


# -- what the network is given, and errors ---------------------------------------------------------------------------


class Spy(nn.Module):
    """Keeps what it was given; answers zero logits."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x, label, cond=None):
        self.seen = x, label, cond
        return x.new_zeros(x.shape[0], self.outputs, *x.shape[2:])


def test_the_network_is_given_features_label_and_condition():
    """Nine features per channel, at most 1 in size but for the scaled x; the label -log-SNR/8, held in its range."""
    sde = CosineSDE()
    net = Spy(LEVELS * 2)
    model = QuantizedScoreNet(net, sde, LEVELS, sigma_data=0.5, label_range=(-3.0, 4.0))
    cond = torch.ones(3, 7)
    for t, expected in [(0.5, -float(sde.log_snr(0.5)) / 8), (0.0, -0.5), (1.0, 0.375)]:
        x = noisy(model, t, torch.float64, n=3, shape=(2, 4))
        model.denoise(x, t, cond)
        features, label, given_cond = net.seen
        assert tuple(features.shape) == (3, QuantizedScoreNet.input_channels(2), 4)
        assert QuantizedScoreNet.input_channels(2) == 18
        assert label.tolist() == pytest.approx([expected] * 3, abs=1e-6)
        assert torch.equal(given_cond, cond)
        scale = math.hypot(float(sde.sigma(t)), 0.5 * float(sde.alpha(t)))
        torch.testing.assert_close(features[:, :2], x / scale)
        assert float(features[:, 2:].abs().max()) <= 1.0
    model.denoise(noisy(model, 0.0, torch.float64, shape=(2, 4)), 0.0)
    assert float(net.seen[0][:, 2:].abs().max()) > 0.9  # clear signal: the waves are not damped
    model.denoise(noisy(model, 1.0, torch.float64, shape=(2, 4)), 1.0)
    assert float(net.seen[0][:, 2:].abs().max()) < 1e-6  # no signal left: they are


def test_bad_arguments():
    """Levels, range, sigma_data and the type of x are checked, with messages that say what was got."""
    net = Spy(LEVELS)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        QuantizedScoreNet(net, VPSDE(), 1)
    with pytest.raises(TypeError, match="levels"):
        QuantizedScoreNet(net, VPSDE(), 5.0)
    for bad in [(1.0, -1.0), (0.0, 0.0), (math.nan, 1.0)]:
        with pytest.raises(ValueError, match="value_range"):
            QuantizedScoreNet(net, VPSDE(), 5, value_range=bad)
    with pytest.raises(ValueError, match="sigma_data"):
        QuantizedScoreNet(net, VPSDE(), 5, sigma_data=0.0)
    model = QuantizedScoreNet(net, VPSDE(), LEVELS, event_shape=(1, 4))
    with pytest.raises(TypeError, match="floating-point"):
        model.denoise(torch.zeros(2, 1, 4, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        model.denoise(torch.zeros(2, 1, 4), 1.5)
    with pytest.raises(ValueError, match="levels"):
        bits_per_dim(model, torch.zeros(2, 1, 4, dtype=torch.int64), levels=256)


@pytest.mark.parametrize("outputs", [1, LEVELS - 1, 2 * LEVELS])
def test_a_network_of_another_width_is_refused(outputs):
    """One output channel instead of `levels` would broadcast; both shapes are named instead."""
    model = QuantizedScoreNet(Spy(outputs), VPSDE(), LEVELS)
    with pytest.raises(ValueError, match=rf"\(2, {outputs}, 4\), expected \(2, {LEVELS}, 4\)"):
        model.denoise(torch.zeros(2, 1, 4), 0.5)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), RectifiedFlow(), CosineSDE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_finite_at_both_ends(sde, t):
    """sigma = 0 at t = 0 for three of them, alpha = 0 at t = 1 for one: D and eps stay finite, D = x where there is no noise."""
    net = QuantizedScoreNet(LeanUNet(QuantizedScoreNet.input_channels(1), 5, (4,), channels=(8,), blocks=(1,)), sde, 5)
    x = torch.linspace(-0.95, 0.95, 8).reshape(2, 1, 4)
    denoised, noise = net.predict(x, t)
    assert torch.isfinite(denoised).all()
    assert torch.isfinite(noise).all()
    if float(sde.sigma(t)) == 0.0:
        torch.testing.assert_close(denoised, x, rtol=1e-5, atol=1e-5)
