"""Dequantization against discrete probabilities that are known: bounds that are off by exactly what theory says."""

import math
import warnings

import pytest
import torch
from torch import nn

from scoresde import VESDE, VPSDE, GaussianMixture, ScoreNet, bits_per_dim, log_prob
from scoresde.likelihood import Exact, Hutchinson, dequantize, quantize
from scoresde.likelihood.dequantization import (
    Dequantizer,
    TruncatedNormalDequantizer,
    UniformDequantizer,
    VariationalDequantizer,
    log_mean_weight,
    looks_quantized,
    warn_if_quantized,
)
from scoresde.rng import RandomSource, derive, spawn

LOG2 = math.log(2)
RANGE, LEVELS = (-1.5, 1.5), 6


@pytest.fixture(scope="module")
def line():
    """Two normals on a line, coarse intervals: uniform dequantization loses about a tenth of a bit."""
    return GaussianMixture.isotropic([[-0.4], [0.3]], 0.2)


@pytest.fixture(scope="module")
def comb():
    """A model of four centres, as a network trained on images without noise would be: its marginal at t_min is a comb."""
    return GaussianMixture.isotropic([[-0.75], [-0.25], [0.25], [0.75]], 1e-3, [0.4, 0.1, 0.2, 0.3])


@pytest.fixture(scope="module")
def patch():
    """Two kinds of 1 x 2 x 2 images, independent pixels given the kind."""
    means = torch.tensor([[0.3, -0.3, 0.1, 0.5], [-0.4, 0.2, 0.0, -0.2]], dtype=torch.float64)
    variances = torch.tensor([[0.04, 0.06, 0.03, 0.05], [0.05, 0.03, 0.08, 0.04]], dtype=torch.float64)
    return GaussianMixture([0.6, 0.4], means, torch.diag_embed(variances), event_shape=(1, 2, 2))


def exact_log_probability(mixture, sde, k, levels, value_range):
    """log P(k) (B,) of the marginal at t_min, for mixtures with diagonal covariances: a product of integrals per kind."""
    alpha, sigma = float(sde.alpha(sde.t_min)), float(sde.sigma(sde.t_min))
    std = (alpha**2 * mixture.covariances.diagonal(dim1=1, dim2=2) + sigma**2).sqrt()  # (K, d)
    edges = torch.linspace(*value_range, levels + 1, dtype=torch.float64)
    cdf = torch.special.ndtr((edges - alpha * mixture.means[..., None]) / std[..., None])  # (K, d, levels + 1)
    per_pixel = cdf.diff(dim=-1).clamp_min(1e-300).log()
    rows = k.flatten(1).long()
    joint = torch.stack([p[torch.arange(rows.shape[1]), rows].sum(1) for p in per_pixel], 1)
    return torch.logsumexp(joint + mixture.weights.log(), 1)


def expected_gaps(mixture, sde, levels, value_range, log_q):
    """KL(q || p on the interval) of every level of a 1-D mixture, nats, by the midpoint rule; log_q(place in [-1/2, 1/2])."""
    m, width = 20_000, (value_range[1] - value_range[0]) / levels
    place = (torch.arange(m, dtype=torch.float64) + 0.5) / m - 0.5
    gaps = []
    for level in range(levels):
        v = value_range[0] + width * (level + 0.5 + place)
        log_p = mixture.diffuse(sde).log_prob(v[:, None], sde.t_min)
        mass = torch.logsumexp(log_p, 0) + math.log(width / m)
        density = log_q(place, width)
        assert float(density.exp().mean() * width) == pytest.approx(1, abs=1e-6)
        gaps.append((density.exp() * (density - log_p)).mean() * width + mass)
    return torch.stack(gaps)


def uniform_log_q(place, width):
    return torch.full_like(place, -math.log(width))


def truncated_log_q(std):
    def log_q(place, width):
        mass = math.erf(width / (2 * std) / 2**0.5)
        return -0.5 * (place * width / std) ** 2 - math.log((2 * math.pi) ** 0.5 * std * mass)

    return log_q


def z_of(values):
    return float(values.mean() / (values.std() / math.sqrt(len(values))))


def importance_bound(model, k, points, samples, source):
    """The bound in nats (B,) with the closed-form density in place of a solve."""
    log_w = []
    for _ in range(samples):
        v, log_q = points.draw(k, source)
        log_w.append(model.log_prob(v, model.sde.t_min) - log_q)
    return log_mean_weight(torch.stack(log_w))


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uniform", "truncated-normal"])
@pytest.mark.parametrize("which", ["line", "comb"])
def test_the_gap_is_the_divergence_from_the_interval(name, which, request):
    """Bits minus the exact code length, against quadrature: for a smooth density uniform is close, for a comb the other."""
    mixture = request.getfixturevalue(which)
    sde = VPSDE(t_min=0.005)  # noise of 0.027 at t_min
    levels, ends = (LEVELS, RANGE) if which == "line" else (4, (-1.0, 1.0))
    model = mixture.diffuse(sde)
    k = quantize(mixture.sample(500, seed=0), levels, ends)
    got = bits_per_dim(
        model, k, levels=levels, value_range=ends, dequantization=name, seed=1, rtol=1e-5, atol=1e-5, batch_size=500
    )
    excess = got.per_example * LOG2 + exact_log_probability(mixture, sde, k, levels, ends)
    std = float(sde.sigma(sde.t_min) / sde.alpha(sde.t_min))
    log_q = uniform_log_q if name == "uniform" else truncated_log_q(std)
    gaps = expected_gaps(mixture, sde, levels, ends, log_q)[k.flatten()]
    assert float(gaps.min()) > -1e-3
    assert abs(float((excess - gaps).mean())) < 4 * float((excess - gaps).std()) / 500**0.5 + 2e-3
    if which == "line":
        assert (0.03 < float(gaps.mean()) < 0.2) if name == "uniform" else (float(gaps.mean()) > 0.2)
    else:
        assert (float(gaps.mean()) > 1.0) if name == "uniform" else (float(gaps.mean()) < 0.01)


def test_truncated_normal_closes_the_gap_of_a_comb(comb):
    """Example by example: at most a hundredth of uniform's gap."""
    sde = VPSDE(t_min=0.005)
    ends = (-1.0, 1.0)
    k = quantize(comb.sample(200, seed=2), 4, ends)
    options = dict(levels=4, value_range=ends, seed=3, batch_size=400)
    exact = -exact_log_probability(comb, sde, k, 4, ends) / LOG2
    uniform, normal = (
        bits_per_dim(comb.diffuse(sde), k, dequantization=name, draws=2, **options).per_example - exact
        for name in ("uniform", "truncated-normal")
    )
    assert float(normal.mean()) < 0.01 * float(uniform.mean())
    assert float(normal.abs().max()) < 0.02  # log p - log q is nearly constant: every single draw is close


def test_importance_weighting_tightens_monotonically(patch):
    """1, 4, 16, 64 points: each bound is above the exact code length and below the one before; then as theory has it."""
    sde = VPSDE()
    model, ends = patch.diffuse(sde), (-1.5, 1.5)
    k = quantize(patch.sample(3000, seed=0), 5, ends)
    exact = exact_log_probability(patch, sde, k, 5, ends)
    points = UniformDequantizer(5, ends, dtype=torch.float64)
    gaps = {s: exact - importance_bound(model, k, points, s, RandomSource(s, "cpu", 3000)) for s in (1, 4, 16, 64)}
    for a, b in ((1, 4), (4, 16), (16, 64)):
        assert z_of(gaps[a] - gaps[b]) > 4
    assert z_of(gaps[16]) > 4
    assert z_of(gaps[64]) > -3
    # delta method: the gap of K points is Var(w) / (2 K E[w]^2) to first order
    weights = torch.stack([importance_bound(model, k, points, 1, RandomSource(9 + s, "cpu", 3000)) for s in range(100)])
    w = (weights - exact).exp()
    asymptote = float((w.var(0) / 2 / 64).mean())
    assert float(w.mean()) == pytest.approx(1, abs=4 * float(w.mean(0).std()) / 3000**0.5)  # p/q has mean P
    assert abs(float(gaps[64].mean()) - asymptote) < 4 * float(gaps[64].std()) / 3000**0.5 + 0.15 * asymptote


def test_importance_weighting_through_the_flow(line):
    """The public call with 1 and 16 points: the same order, from above, and the cost that it states."""
    sde = VPSDE()
    k = quantize(line.sample(800, seed=0), LEVELS, RANGE)
    exact = -exact_log_probability(line, sde, k, LEVELS, RANGE) / LOG2
    options = dict(levels=LEVELS, value_range=RANGE, seed=0, batch_size=5000)
    one, many = (bits_per_dim(line.diffuse(sde), k, samples=s, **options) for s in (1, 16))
    assert z_of(one.per_example - many.per_example) > 4
    assert z_of(many.per_example - exact) > -3
    assert float((many.per_example - exact).mean()) < 0.2 * float((one.per_example - exact).mean())
    assert many.nfe == pytest.approx(16 * one.nfe, rel=0.1)


@pytest.mark.parametrize("target", ["model", "density"])
def test_a_learned_dequantizer_closes_most_of_the_gap(line, target):
    """Of a smooth density: a tenth of uniform's gap or less, whether it learns from scores or from a log density."""
    sde = VPSDE()
    model = line.diffuse(sde)
    k = quantize(line.sample(2000, seed=0), LEVELS, RANGE)
    exact = exact_log_probability(line, sde, k, LEVELS, RANGE)
    points = VariationalDequantizer((1,), LEVELS, RANGE, dtype=torch.float64)
    uniform = exact - importance_bound(model, k, points, 1, RandomSource(1, "cpu", 2000))
    before = torch.get_rng_state()
    assert points.fit(model if target == "model" else lambda v: model.log_prob(v, sde.t_min), k, seed=0) is points
    assert torch.equal(before, torch.get_rng_state())
    learned = exact - importance_bound(model, k, points, 1, RandomSource(2, "cpu", 2000))
    assert z_of(learned) > -2
    assert float(learned.mean()) < 0.1 * float(uniform.mean())
    assert all(p.grad is None for p in points.parameters())


def test_a_learned_dequantizer_of_images(patch):
    """Convolutions see the neighbours, and the public call takes the object."""
    sde = VPSDE()
    model, ends = patch.diffuse(sde), (-1.5, 1.5)
    k = quantize(patch.sample(600, seed=1), 5, ends)
    exact = -exact_log_probability(patch, sde, k, 5, ends) / (4 * LOG2)
    points = VariationalDequantizer((1, 2, 2), 5, ends, width_net=16).fit(model, k, steps=250, seed=0)
    options = dict(levels=5, value_range=ends, seed=2, batch_size=600)
    uniform = bits_per_dim(model, k, **options).per_example - exact
    learned = bits_per_dim(model, k, dequantization=points, **options).per_example - exact
    assert z_of(learned) > -2
    assert float(learned.mean()) < 0.35 * float(uniform.mean())


def test_a_learned_dequantizer_of_a_comb(comb):
    """It also finds the narrow normals: a twentieth of uniform's gap."""
    sde = VPSDE(t_min=0.005)
    model, ends = comb.diffuse(sde), (-1.0, 1.0)
    k = quantize(comb.sample(1000, seed=1), 4, ends)
    exact = exact_log_probability(comb, sde, k, 4, ends)
    points = VariationalDequantizer((1,), 4, ends).fit(model, k, steps=300, seed=0)
    learned, uniform = (
        exact - importance_bound(model, k, p, 1, RandomSource(7, "cpu", 1000))
        for p in (points, UniformDequantizer(4, ends))
    )
    assert z_of(learned) > -3
    assert float(learned.mean()) < 0.05 * float(uniform.mean())


# -- densities ---------------------------------------------------------------------------------------------------------


def perturbed_dequantizer(event, levels, value_range):
    points = VariationalDequantizer(event, levels, value_range, width_net=8, dtype=torch.float64)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in points.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return points


@pytest.mark.parametrize("kind", ["uniform", "narrow", "medium", "wide", "learned"])
def test_points_lie_in_their_intervals_and_have_the_stated_density(kind):
    """E_q[f(v)/q(v)] is the integral of f over the interval, for f = 1, v and v^2; and every point comes back."""
    ends, levels, n = (-1.0, 2.0), 6, 40_000
    if kind == "uniform":
        points = UniformDequantizer(levels, ends, dtype=torch.float64)
    elif kind == "learned":
        points = perturbed_dequantizer((1,), levels, ends)
    else:
        std = {"narrow": 0.12, "medium": 0.3, "wide": 1e4}[kind]
        points = TruncatedNormalDequantizer(levels, ends, std=std, dtype=torch.float64)
    for level in (0, 3, 5):
        k = torch.full((n, 1), level)
        v, log_q = points.draw(k, 1)
        assert torch.equal(quantize(v, levels, ends), k)
        assert log_q.dtype == torch.float64
        low = ends[0] + 0.5 * level
        for power in range(3):
            f = v[:, 0] ** power / log_q.exp()
            integral = ((low + 0.5) ** (power + 1) - low ** (power + 1)) / (power + 1)
            assert abs(float(f.mean()) - integral) < 4.5 * float(f.std()) / n**0.5 + 1e-9
    if kind == "wide":  # so wide a normal is uniform
        assert float((log_q + math.log(0.5)).abs().max()) < 1e-6


def test_densities_add_over_entries_and_follow_the_scale():
    """d entries give d times as much; alpha below 1 shrinks interval and density."""
    ends, k = (-1.0, 1.0), torch.tensor([[3, 0, 7, 7], [1, 2, 2, 5]])
    for points in (UniformDequantizer(8, ends), TruncatedNormalDequantizer(8, ends, std=0.1)):
        v, log_q = points.draw(k, [4, 5])
        assert v.shape == k.shape
        assert v.dtype == torch.float32
        assert log_q.shape == (2,)
        again, same = points.draw(k[1:], [5])
        assert torch.equal(again[0], v[1])
        assert torch.equal(same[0], log_q[1])
    double, half = (TruncatedNormalDequantizer(8, ends, std=0.1, scale=s, dtype=torch.float64) for s in (1.0, 0.5))
    (v, log_q), (w, log_r) = double.draw(k, 0), half.draw(k, 0)
    torch.testing.assert_close(w, v / 2)
    torch.testing.assert_close(log_r, log_q + 4 * math.log(2))


def test_an_unfitted_dequantizer_is_uniform():
    """To the bit in its density, up to rounding in its points; and its first weights leave the global state alone."""
    before = torch.get_rng_state()
    for event in ((3,), (2, 4, 4), (2, 3)):
        points = VariationalDequantizer(event, 16, dtype=torch.float64)
        k = torch.randint(0, 16, (5, *event), generator=torch.Generator().manual_seed(0))
        v, log_q = points.draw(k, RandomSource(0, "cpu", 5))
        u = RandomSource(0, "cpu", 5).uniform(k.shape, torch.float64)
        torch.testing.assert_close(v, dequantize(k, 16, (-1.0, 1.0), u))
        torch.testing.assert_close(log_q, torch.full((5,), -math.prod(event) * math.log(2 / 16), dtype=torch.float64))
    assert torch.equal(before, torch.get_rng_state())


def test_a_learned_dequantizer_is_saved_and_reproduced(line):
    """The same seeds give the same parameters; a state dict carries them; training mode is kept."""
    k = quantize(line.sample(100, seed=0), LEVELS, RANGE)
    a, b, c = (
        VariationalDequantizer((1,), LEVELS, RANGE).fit(line.diffuse(VPSDE()), k, steps=5, seed=s) for s in (1, 1, 2)
    )
    x, y, z = (list(m.state_dict().values()) for m in (a, b, c))
    assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(x, z, strict=True))
    c.load_state_dict(a.state_dict())
    assert torch.equal(a.draw(k, 0)[0], c.draw(k, 0)[0])
    assert a.training


# -- the public call -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(image16):
    return quantize(image16.sample(9, seed=5), 256, (-1.0, 1.0)).to(torch.uint8)


def test_the_default_is_to_the_bit_what_one_solve_gives(image16, images):
    """One uniform draw from (seed, i, 1), probes from (seed, i, 2), the Jacobian: nothing else has a part in it."""
    model = image16.diffuse(VPSDE())
    how = dict(divergence=Hutchinson(2), rtol=1e-2, atol=1e-2, plan=None)
    got = bits_per_dim(model, images, seed=7, **how)
    seeds = spawn(7, 9)
    u = RandomSource([derive(s, 1) for s in seeds], "cpu", 9).uniform(images.shape, torch.float32)
    x = dequantize(images, 256, (-1.0, 1.0), u)
    r = log_prob(model, x, seed=[derive(s, 2) for s in seeds], **how)
    assert torch.equal(got.per_example, -(r.value + 16 * math.log(2 / 256)) / (16 * LOG2))
    assert torch.equal(got.trace_stderr, r.stderr / (16 * LOG2))
    assert torch.equal(got.per_draw[:, 0], got.per_example)
    assert math.isnan(got.draw_stderr)
    same = bits_per_dim(model, images, seed=7, dequantization=UniformDequantizer(256), **how)
    assert torch.equal(got.per_example, same.per_example)


def test_samples_and_draws_do_not_depend_on_the_batch_size(image16, images):
    """One row or all copies at once; the first of several draws is the only one of a single draw."""
    model = image16.diffuse(VPSDE())
    options = dict(seed=1, rtol=1e-2, atol=1e-2, divergence=Hutchinson(1), draws=2)
    whole = bits_per_dim(model, images, samples=3, batch_size=256, **options)
    for size in (4, 20):
        got = bits_per_dim(model, images, samples=3, batch_size=size, **options)
        torch.testing.assert_close(got.per_draw, whole.per_draw, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.trace_stderr, whole.trace_stderr, equal_nan=True)
    assert tuple(whole.per_draw.shape) == (9, 2)
    torch.testing.assert_close(whole.per_example, whole.per_draw.mean(1))
    single = bits_per_dim(model, images, samples=3, batch_size=256, **{**options, "draws": 1})
    torch.testing.assert_close(single.per_draw[:, 0], whole.per_draw[:, 0], rtol=0, atol=1e-4)


def test_the_error_over_draws_is_calibrated(line):
    """The spread of the mean over seeds, with the same data, is `draw_stderr`; `stderr` also knows the data's scatter."""
    k = quantize(line.sample(30, seed=0), LEVELS, RANGE)
    results = [
        bits_per_dim(line.diffuse(VPSDE()), k, levels=LEVELS, value_range=RANGE, draws=4, seed=s, rtol=1e-3, atol=1e-3)
        for s in range(40)
    ]
    observed = float(torch.tensor([r.mean for r in results]).std())
    reported = float(torch.tensor([r.draw_stderr for r in results]).square().mean().sqrt())
    assert 0.7 < observed / reported < 1.4
    assert all(r.stderr > r.draw_stderr for r in results)


def test_shared_probes_keep_the_trace_error_out_of_the_logarithm(image16, images):
    """16 points with one probe each: in the mean what the exact trace gives. Independent probes would be off by more."""
    model = image16.diffuse(VPSDE())
    options = dict(seed=1, rtol=1e-3, atol=1e-3, samples=8, batch_size=256)
    exact = bits_per_dim(model, images[:4], divergence=Exact(), **options).per_example
    noisy = bits_per_dim(model, images[:4], divergence=Hutchinson(2), draws=8, **options)
    once = noisy.per_draw - exact[:, None]
    assert abs(z_of(once.flatten())) < 4
    assert float(noisy.trace_stderr.mean()) == pytest.approx(float(once.std()) / 8**0.5, rel=0.5)


def test_conditions_follow_their_rows():
    """With several points per example every copy of row i gets condition i."""

    class Shift(nn.Module):
        def forward(self, x, label, cond):
            return 0.3 * x + cond

    model = ScoreNet(Shift(), VPSDE(t_min=1e-3), "edm", levels=4)
    k, cond = torch.tensor([[0, 1], [2, 3], [1, 1]]), torch.tensor([[0.0], [1.0], [-2.0]])
    options = dict(seed=3, samples=2, draws=2)
    whole = bits_per_dim(model, k, cond=cond, **options).per_example
    chunked = bits_per_dim(model, k, cond=cond, batch_size=2, **options).per_example
    torch.testing.assert_close(whole, chunked, rtol=0, atol=1e-3)
    other = bits_per_dim(model, k, cond=cond.flip(0), **options).per_example
    assert float((whole - other).abs().max()) > 0.1
    points = VariationalDequantizer((2,), 4).fit(model, k, steps=3, cond=cond)
    assert math.isfinite(bits_per_dim(model, k, cond=cond, dequantization=points).mean)


def test_refusals(line, comb):
    """Names, counts, and objects made for something else."""
    model, k = line.diffuse(VPSDE()), torch.tensor([[0], [5]])
    options = dict(levels=LEVELS, value_range=RANGE)
    for bad, message in (("gaussian", "uniform, truncated-normal"), ("variational", "VariationalDequantizer")):
        with pytest.raises(ValueError, match=message):
            bits_per_dim(model, k, dequantization=bad, **options)
    for bad in (3, None, UniformDequantizer):
        with pytest.raises(TypeError):
            bits_per_dim(model, k, dequantization=bad, **options)
    with pytest.raises(ValueError, match="made for levels=8"):
        bits_per_dim(model, k, dequantization=UniformDequantizer(8, RANGE), **options)
    with pytest.raises(ValueError, match="made for value_range"):
        bits_per_dim(model, k, dequantization=UniformDequantizer(LEVELS), **options)
    for name in ("samples", "draws"):
        with pytest.raises(ValueError, match=name):
            bits_per_dim(model, k, **options, **{name: 0})
    with pytest.raises(ValueError, match="t_min > 0"):
        bits_per_dim(line.diffuse(VPSDE(t_min=0.0)), k, dequantization="truncated-normal", **options)
    with pytest.raises(TypeError, match="abstract"):
        Dequantizer()
    for arguments in ({"levels": 1}, {"levels": 4, "value_range": (1.0, 1.0)}):
        with pytest.raises(ValueError):
            UniformDequantizer(**arguments)
    for options in ({"std": 0.0}, {"std": 1.0, "scale": -1.0}):
        with pytest.raises(ValueError):
            TruncatedNormalDequantizer(4, **options)
    with pytest.raises(TypeError, match="integers"):
        UniformDequantizer(4).draw(torch.zeros(2, 2))


def test_a_dequantizer_that_misbehaves_is_named(line):
    """Shapes of what `draw` returns are checked."""

    class Wrong:
        def draw(self, data, source):
            return data.float(), torch.zeros(data.shape)

    with pytest.raises(ValueError, match="log density"):
        bits_per_dim(line.diffuse(VPSDE()), torch.tensor([[1], [2]]), levels=4, dequantization=Wrong())


def test_refusals_of_fit(line):
    """Data, targets and NaN."""
    points, k = VariationalDequantizer((1,), LEVELS, RANGE), torch.tensor([[0], [5]])
    model = line.diffuse(VPSDE())
    with pytest.raises(ValueError, match="empty"):
        points.fit(model, k[:0])
    with pytest.raises(ValueError, match="shape"):
        points.fit(model, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="ScoreModel"):
        points.fit("model", k)
    with pytest.raises(ValueError, match="no gradient"):
        points.fit(lambda v: log_prob(model, v).value, k, steps=1)
    with pytest.raises(ValueError, match="target returned"):
        points.fit(lambda v: v, k, steps=1)
    with pytest.raises(ValueError, match="step 0"):
        points.fit(lambda v: v.sum(1) * math.nan, k, steps=1)
    for options in ({"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError):
            points.fit(model, k, **options)
    with pytest.raises(ValueError, match="given to the dequantizer"):
        points.draw(torch.zeros(2, 3, dtype=torch.int64), 0)
    for event, error in (((), ValueError), ((0,), ValueError), ((2.5,), TypeError)):
        with pytest.raises(error):
            VariationalDequantizer(event, 4)


def test_ve_at_its_own_noise(line):
    """sigma_min of VE is the width of its truncated normal, whatever the t; the bound holds there too."""
    sde = VESDE(sigma_min=0.05, sigma_max=10.0)
    k = quantize(line.sample(200, seed=0), LEVELS, RANGE)
    got = bits_per_dim(
        line.diffuse(sde), k, levels=LEVELS, value_range=RANGE, dequantization="truncated-normal", seed=0
    )
    excess = got.per_example * LOG2 + exact_log_probability(line, sde, k, LEVELS, RANGE)
    std = float(sde.sigma(sde.t_min))
    gaps = expected_gaps(line, sde, LEVELS, RANGE, truncated_log_q(std))[k.flatten()]
    assert abs(z_of(excess - gaps)) < 4


# -- data that were not dequantized ----------------------------------------------------------------------------------------


def test_looks_quantized():
    """Scaled integers in any of the usual ways are recognised; dequantized and continuous data are not."""
    g = torch.Generator().manual_seed(0)
    k = torch.randint(0, 256, (64, 3, 8, 8), generator=g)
    k[0, :, 0, 0], k[0, :, 0, 1] = 0, 255
    mean, std = torch.tensor([0.49, 0.48, 0.44]), torch.tensor([0.24, 0.25, 0.26])
    for scaled in (k / 255, k / 127.5 - 1, 2 * (k + 0.5) / 256 - 1, k.double(), (k / 255).half().float() * 0 + k / 255):
        assert looks_quantized(scaled) == 256
    per_channel = (k / 255 - mean[:, None, None]) / std[:, None, None]
    assert looks_quantized(per_channel) == 256
    assert looks_quantized((k[:, :1, :, :] // 16).float()) == 16
    u = torch.rand(k.shape, generator=g)
    assert looks_quantized((k + u) / 256) is None
    assert looks_quantized(torch.randn(500, 4, generator=g)) is None
    sparse = torch.randn(500, 16, generator=g) * (torch.rand(500, 16, generator=g) < 0.2)  # many zeros, no grid
    assert looks_quantized(sparse) is None
    mixed = torch.cat([k[:, :1] / 255, torch.randn(64, 1, 8, 8, generator=g)], 1)
    assert looks_quantized(mixed) is None
    assert looks_quantized(k / 255, max_levels=100) is None
    for trivial in (torch.zeros(4, 9), torch.full((4, 9), math.nan), torch.randn(1, 2), torch.zeros(0, 3)):
        assert looks_quantized(trivial) is None
    with pytest.raises(TypeError, match="floating-point"):
        looks_quantized(k)


def test_the_warning_spares_the_points_of_a_plot():
    """A mesh of the plane is a grid and no mistake; images of 16 entries or more are warned about."""
    axis = torch.linspace(-2, 2, 50)
    mesh = torch.cartesian_prod(axis, axis)
    assert looks_quantized(mesh) == 50
    k = torch.randint(0, 16, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_quantized(mesh, "log_prob")
        warn_if_quantized((k + torch.rand(k.shape, generator=torch.Generator().manual_seed(1))) / 16, "log_prob")
    with pytest.warns(UserWarning, match="log_prob lie on a grid of 16 levels"):
        warn_if_quantized(k / 15, "log_prob")
