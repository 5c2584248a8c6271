"""The variational bound on exact models, where the bound is tight and every error is chance."""

import math

import pytest
import torch

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    CosineSDE,
    GaussianMixture,
    NonFiniteError,
    RectifiedFlow,
    ScoreNet,
    SubVPSDE,
    elbo,
    log_prob,
)
from scoresde.likelihood import dequantize, variational
from scoresde.nets import MLP

SDES = [VPSDE(), SubVPSDE(), VESDE(), CosineSDE(-10.0, 16.0), EDMSDE(), RectifiedFlow()]


@pytest.mark.parametrize("process", SDES, ids=lambda s: type(s).__name__)
def test_the_bound_of_an_exact_model_is_its_log_density(process, full3):
    """With the exact posterior the gap is the ends of the schedule alone: nothing that 4 standard errors show."""
    model = full3.diffuse(process)
    x = full3.sample(1500, seed=1)
    result = elbo(model, x, draws=24, seed=2)
    difference = result.value - full3.log_prob(x)
    error = float(difference.std() / math.sqrt(len(x)))
    assert error < 0.06
    assert abs(float(difference.mean())) < 4 * error + 0.01
    # the errors that it reports explain the scatter
    assert float(result.stderr.square().mean().sqrt()) == pytest.approx(float(difference.std()), rel=0.2)


def test_the_bound_holds_example_by_example(ring8):
    """Also at points that the mixture would hardly draw: the mean over noise is the log density there."""
    model = ring8.diffuse(CosineSDE(-10.0, 16.0))
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [-1.2, 0.1]], dtype=torch.float64)
    n = 250
    result = elbo(model, points.repeat_interleave(n, 0), draws=24, seed=3)
    value = result.value.reshape(4, n)
    z = (value.mean(1) - ring8.log_prob(points)) / (value.std(1) / math.sqrt(n))
    assert float(z.abs().max()) < 4


def test_a_worse_model_has_a_lower_bound(full3):
    """An untrained network (D of a standard normal) stays below the truth by the KL divergence at least."""
    torch.manual_seed(0)
    model = ScoreNet(MLP(3, width=8, depth=1), VPSDE(), "edm")
    x = full3.sample(512, seed=1)
    bound = elbo(model, x, draws=24, seed=2).value
    # with a zero output the edm form is the exact denoiser of N(0, 1)
    normal = -0.5 * x.square().sum(1) - 1.5 * math.log(2 * math.pi)
    z = (bound - normal).mean() / ((bound - normal).std() / math.sqrt(512))
    assert abs(float(z)) < 4
    assert float(bound.mean()) < float(full3.log_prob(x).mean()) - 0.1


@pytest.mark.parametrize("name", ["ring8", "full3", "image16"])
@pytest.mark.parametrize("process", [CosineSDE(-10.0, 16.0), EDMSDE()], ids=lambda s: type(s).__name__)
def test_standard_errors_are_calibrated(name, process, request):
    """The spread over seeds is what `stderr` says: their ratio is within 0.8 to 1.25."""
    mixture = request.getfixturevalue(name)
    model = mixture.diffuse(process)
    x = mixture.sample(48, seed=4)
    results = [elbo(model, x, draws=16, seed=s) for s in range(24)]
    observed = torch.stack([r.value for r in results]).var(0).mean().sqrt()
    reported = torch.stack([r.stderr for r in results]).square().mean().sqrt()
    assert 0.8 < float(observed / reported) < 1.25


@pytest.mark.parametrize("draws", [2, 4, 15, 16])
@pytest.mark.parametrize("batch", [1, 4])
def test_standard_errors_of_small_batches_are_calibrated(batch, draws, full3):
    """An example alone knows its error, from two draws on; an odd number leaves one draw a stratum, whose differences show it."""
    model = full3.diffuse(EDMSDE())
    x = full3.sample(batch, seed=4)
    results = [elbo(model, x.repeat(320 // batch, 1), draws=draws, seed=s) for s in range(3)]
    observed = torch.cat([r.value.reshape(-1, batch) for r in results]).var(0).mean().sqrt()
    reported = torch.stack([r.stderr for r in results]).square().mean().sqrt()
    assert 0.8 < float(observed / reported) < 1.25


@pytest.mark.parametrize("name", ["full3", "image16"])
def test_the_control_variates_are_unbiased_and_help(name, request, monkeypatch):
    """Without them: the same mean in a z-test, a variance that is several times larger."""
    mixture = request.getfixturevalue(name)
    model, x = mixture.diffuse(CosineSDE(-10.0, 16.0)), mixture.sample(64, seed=5)
    with_them = torch.stack([elbo(model, x, draws=16, seed=s).value for s in range(40)])
    monkeypatch.setattr(variational, "controlled", lambda ratio, *rest: ratio)
    without = torch.stack([elbo(model, x, draws=16, seed=1000 + s).value for s in range(40)])
    (a, va), (b, vb) = ((v.mean(), v.var(0).mean()) for v in (with_them, without))
    z = (a - b) / torch.sqrt(va / with_them.numel() + vb / without.numel())
    assert abs(float(z)) < 4
    assert float(vb / va) > (3 if name == "full3" else 2.5)
    # and against the truth, which is known
    per_run = (with_them - mixture.log_prob(x)).mean(1)
    assert abs(float(per_run.mean() / (per_run.std() / math.sqrt(40)))) < 4


def test_the_place_within_a_stratum_is_controlled(monkeypatch):
    """In 200 dimensions of one scale the error rises steeply with log-SNR: without this control variate twice the spread."""
    mixture = GaussianMixture.isotropic([[0.0] * 200], 0.5)
    model, x = mixture.diffuse(VPSDE()), mixture.sample(100, seed=0)
    exact, controlled = mixture.log_prob(x), variational.controlled
    spread = float((elbo(model, x, seed=0).value - exact).std())
    monkeypatch.setattr(variational, "controlled", lambda r, e, place, *rest: controlled(r, e, 0 * place, *rest))
    assert spread < 0.65 * float((elbo(model, x, seed=0).value - exact).std())


@pytest.mark.parametrize("draws", [1, 5, 16])
def test_a_bound_depends_on_its_example_and_its_seed_alone(draws, full3):
    """33 rows at once, one by one, and among others: the same numbers, up to the order in which float64 is summed."""
    model, x = full3.diffuse(VPSDE()), full3.sample(33, seed=11)
    seeds = [7 * i + 3 for i in range(33)]
    whole = elbo(model, x, draws=draws, seed=seeds)
    alone = [elbo(model, x[i : i + 1], draws=draws, seed=seeds[i : i + 1]) for i in range(33)]
    among = elbo(model, torch.cat([100 * x[:5], x[20:]]), draws=draws, seed=[1, 2, 3, 4, 5, *seeds[20:]])
    for name in ("value", "stderr", "latent"):
        values = getattr(whole, name)
        single = torch.cat([getattr(r, name) for r in alone])
        torch.testing.assert_close(single, values, rtol=1e-11, atol=1e-11, equal_nan=True)
        torch.testing.assert_close(getattr(among, name)[5:], values[20:], rtol=1e-11, atol=1e-11, equal_nan=True)


def test_equal_seeds_and_rows_have_equal_bounds(full3):
    """One image under every class has one seed 32 times: finite, and equal where all else is."""
    model, x = full3.diffuse(VPSDE()), full3.sample(1, seed=12).expand(32, 3)
    got = elbo(model, x, draws=8, seed=[5] * 32)
    assert bool(torch.isfinite(got.value).all())
    torch.testing.assert_close(got.value, got.value[:1].expand(32), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.stderr, got.stderr[:1].expand(32), rtol=1e-9, atol=0)


SHORT = [VPSDE(beta_max=1.0), SubVPSDE(beta_max=1.0), VESDE(sigma_max=1.0)]


@pytest.mark.parametrize("process", SHORT, ids=lambda s: type(s).__name__)
def test_the_exact_bound_of_a_gaussian_with_a_large_prior_term(process):
    """Processes that end with signal left: the three terms of the bound given x_0, all Gaussian, the integral by a fine rule."""
    std, n, d = 0.6, 800, 3
    x = torch.tensor([[0.9, -1.1, 0.4]], dtype=torch.float64)
    model = GaussianMixture.isotropic([[0.0] * d], std).diffuse(process)
    high, low = process.log_snr(torch.tensor([process.t_min, 1.0], dtype=torch.float64)).tolist()
    lam = low + (high - low) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    w = 1 / (1 + torch.exp(-lam) / std**2)
    error = d * w**2 + (1 - w) ** 2 * lam.exp() * x.square().sum()
    decoder = 0.5 * d * (math.log(2 * math.pi * math.e) - high)
    alpha, sigma, prior_std = float(process.alpha(1.0)), float(process.sigma(1.0)), process.prior_std
    normal = torch.distributions.Normal
    prior = torch.distributions.kl_divergence(normal(alpha * x, torch.full_like(x, sigma)), normal(0.0 * x, prior_std))
    assert float(prior.sum()) > 0.4
    expected = -(0.5 * (high - low) * error.mean() + decoder + prior.sum())
    got = elbo(model, x.expand(n, d), draws=64, seed=1).value
    assert float(got.std()) / math.sqrt(n) < 0.04
    assert abs(float(got.mean() - expected)) < 4 * float(got.std()) / math.sqrt(n)


def test_more_draws_reduce_the_error(full3):
    """Stratified draws: 4 times as many at least halve the spread, and the reported error."""
    model = full3.diffuse(VPSDE())
    x = full3.sample(400, seed=6)
    exact = full3.log_prob(x)
    few, many = (elbo(model, x, draws=n, seed=1) for n in (8, 32))
    assert float((few.value - exact).std() / (many.value - exact).std()) > 1.7
    assert float(few.stderr.mean() / many.stderr.mean()) > 1.7
    assert few.nfe.tolist() == [8] * 400
    assert many.nfe.tolist() == [32] * 400


def test_bound_and_flow_agree_on_images(image16):
    """The two likelihoods of the package, the bound and the probability flow, agree within the bound's error."""
    model = image16.diffuse(VPSDE())
    x = image16.sample(10, seed=7)
    flow = log_prob(model, x, rtol=1e-4, atol=1e-4).value
    bound = torch.stack([elbo(model, x, draws=32, seed=s).value for s in range(8)]).mean(0)
    z = (bound - flow).mean() / ((bound - flow).std() / math.sqrt(10))
    assert abs(float(z)) < 4


def test_result_and_reproducibility(full3):
    """Shapes and types as in `log_prob`; a seed decides everything; the global random state is untouched."""
    model = full3.diffuse(VPSDE())
    x = full3.sample(20, seed=8)
    before = torch.get_rng_state()
    a, b, c = (elbo(model, x, draws=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.value, b.value)
    assert torch.equal(a.stderr, b.stderr)
    assert not torch.equal(a.value, c.value)
    assert a.value.dtype == torch.float64
    assert a.latent.shape == x.shape
    assert a.status.tolist() == [0] * 20
    f32 = elbo(model, x.float(), draws=3, seed=1)
    assert f32.value.dtype == torch.float64
    assert f32.latent.dtype == torch.float32


def test_few_examples_and_draws(full3):
    """One draw leaves no scatter to judge by: the error is NaN, the value is finite; one example and no examples work."""
    model = full3.diffuse(VPSDE())
    x = full3.sample(3, seed=9)
    one = elbo(model, x, draws=1, seed=0)
    assert bool(torch.isfinite(one.value).all())
    assert bool(one.stderr.isnan().all())
    for draws in (2, 3, 4):
        assert bool(torch.isfinite(elbo(model, x[:1], draws=draws, seed=0).stderr).all())
    none = elbo(model, x[:0], draws=4, seed=0)
    assert tuple(none.value.shape) == tuple(none.stderr.shape) == tuple(none.nfe.shape) == (0,)


def test_bad_arguments(full3):
    """As `log_prob`: type, shape and NaN of x, and the number of draws."""
    model = full3.diffuse(VPSDE())
    x = full3.sample(3, seed=9)
    with pytest.raises(TypeError, match="floating-point"):
        elbo(model, x.long())
    with pytest.raises(ValueError, match="shape"):
        elbo(model, x[:, :2])
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 3 rows, \[1\]"):
        elbo(model, x.clone().index_fill_(0, torch.tensor([1]), math.nan))
    with pytest.raises(ValueError, match="draws"):
        elbo(model, x, draws=0)
    with pytest.raises(TypeError, match="draws"):
        elbo(model, x, draws=2.5)


def test_nan_from_the_network_is_named():
    """The rows for which it answered NaN; and its training mode is as it was, also after the error."""

    class Sick(MLP):
        def forward(self, x, label, cond=None):
            out = super().forward(x, label, cond)
            return torch.where(torch.arange(len(x))[:, None] == 2, math.nan, out)

    model = ScoreNet(Sick(2, width=4, depth=1), VPSDE()).train()
    with pytest.raises(NonFiniteError, match=r"NaN or infinity at t = .*examples \[2\]"):
        elbo(model, torch.zeros(4, 2), draws=2, seed=0)
    assert all(m.training for m in model.modules())


def test_conditions_reach_the_network():
    """cond is handed over row by row."""
    torch.manual_seed(0)
    net = MLP(2, width=8, depth=1, cond_dim=1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model = ScoreNet(net, VPSDE(), "edm")
    x = torch.zeros(4, 2)
    values = [elbo(model, x, draws=4, seed=0, cond=c).value for c in (None, torch.zeros(4, 1), torch.ones(4, 1))]
    torch.testing.assert_close(values[0], values[1])
    assert float((values[0] - values[2]).abs().max()) > 1e-3


def test_bits_of_dequantized_pixels():
    """Uniform data on [-1, 1): the bound in bits/dim, -(elbo + d log width)/(d log 2), is log2(levels) or above."""
    wide = GaussianMixture.isotropic([[0.0] * 4], 0.6).diffuse(VPSDE())
    g = torch.Generator().manual_seed(0)
    k = torch.randint(0, 8, (512, 4), generator=g)
    x = dequantize(k, 8, (-1.0, 1.0), torch.rand(k.shape, generator=g, dtype=torch.float64))
    value = elbo(wide, x, draws=16, seed=1).value
    bits = -(value + 4 * math.log(2 / 8)) / (4 * math.log(2))
    # the cross entropy of N(0, 0.6^2) for uniform data, in closed form
    expected = (0.5 * math.log(2 * math.pi * 0.36) + (1 / 3) / (2 * 0.36) - math.log(0.25)) / math.log(2)
    assert float(bits.mean()) == pytest.approx(expected, abs=4 * float(bits.std()) / math.sqrt(512))
    assert expected > 3.0
