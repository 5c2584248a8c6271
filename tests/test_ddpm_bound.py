"""The bound of a chain with finitely many steps, term by term against closed forms."""

import math

import pytest
import torch
from torch import nn

from scoresde import EDMSDE, VPSDE, CosineSDE, GaussianMixture, NonFiniteError, RectifiedFlow, ScoreNet, elbo, grids
from scoresde.likelihood import ddpm, dequantize, quantize
from scoresde.likelihood.ddpm import ddpm_bound
from scoresde.nets import MLP

LOG2 = math.log(2)


def normal(std, d=3):
    return GaussianMixture.isotropic([[0.0] * d], std)


def z_of(values):
    return float(values.mean() / (values.std() / math.sqrt(len(values))))


def expected_step(sde, std, x, t, s, variance):
    """E KL of one step (B,) for data N(0, std^2 I) and their exact denoiser, given x_0: everything is Gaussian."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    d = x.shape[1]
    w = (alpha * std) ** 2 / ((alpha * std) ** 2 + sigma**2)  # D = (w / alpha) x_t
    error = (1 - w) ** 2 * x.square().sum(1) + w**2 * (sigma / alpha) ** 2 * d
    snr_t, snr_s = (float(sde.alpha(v) / sde.sigma(v)) ** 2 for v in (t, s))
    kl = 0.5 * (snr_s - snr_t) * error
    if variance == "small":
        return kl
    # the definition: KL(N(m, q) || N(m', p)) with p the forward variance
    ratio = float(sde.alpha(t) / sde.alpha(s))
    p = sigma**2 - ratio**2 * float(sde.sigma(s)) ** 2
    q = p * float(sde.sigma(s)) ** 2 / sigma**2
    slope = float(sde.alpha(s)) * p / sigma**2  # d mean / d x_0
    return 0.5 * (d * (q / p - 1 - math.log(q / p)) + slope**2 * error / p)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("process", [VPSDE(), EDMSDE(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_every_term_of_a_gaussian(process, variance):
    """Prior exactly; each step and the decoder in a z-test over examples."""
    std, n = 0.5, 800
    mixture = normal(std)
    x = mixture.sample(n, seed=0)
    got = ddpm_bound(mixture.diffuse(process), x, steps=12, variance=variance, samples_per_step=2, seed=1)
    t = got.times.tolist()
    assert len(t) == 13
    assert t[0] == process.t_max
    assert t[-1] == process.t_min
    alpha, sigma, prior = float(process.alpha(t[0])), float(process.sigma(t[0])), process.prior_std
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(alpha * x, torch.full_like(x, sigma)),
        torch.distributions.Normal(torch.zeros_like(x), prior),
    ).sum(1)
    torch.testing.assert_close(got.prior, exact, rtol=1e-9, atol=1e-12)
    assert tuple(got.steps.shape) == (12, n)
    for i in range(12):
        expected = expected_step(process, std, x, t[i], t[i + 1], variance)
        difference = got.steps[i] - expected
        noise = float(difference.std())
        assert abs(float(difference.mean())) < 4.2 * noise / n**0.5 + 1e-9 * float(expected.mean())
    alpha, sigma = float(process.alpha(t[-1])), float(process.sigma(t[-1]))
    w, r = (alpha * std) ** 2 / ((alpha * std) ** 2 + sigma**2), sigma / alpha
    error = (1 - w) ** 2 * x.square().sum(1) + w**2 * r**2 * 3
    decoder = 1.5 * math.log(2 * math.pi * r**2) + 0.5 * error / r**2
    difference = got.reconstruction - decoder
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / n**0.5 + 1e-9
    torch.testing.assert_close(got.diffusion, got.steps.sum(0))
    torch.testing.assert_close(got.value, -(got.prior + got.diffusion + got.reconstruction))
    assert got.nfe == 12 * 2 + 4


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("process", [VPSDE(), EDMSDE()], ids=lambda s: type(s).__name__)
def test_below_the_exact_density_and_closing_with_the_steps(process, variance, full3):
    """A mixture with its exact denoiser: the gap is positive and falls like 1/T where the variance is that of q."""
    x = full3.sample(500, seed=1)
    exact, gaps, errors = full3.log_prob(x), [], []
    for steps in (25, 100, 400):
        gap = exact - ddpm_bound(full3.diffuse(process), x, steps=steps, variance=variance, seed=2).value
        gaps.append(float(gap.mean()))
        errors.append(float(gap.std()) / 500**0.5)
        assert gaps[-1] > -3 * errors[-1]
    assert gaps[0] > gaps[1] + 3 * errors[1]
    if variance == "small" or isinstance(process, EDMSDE):
        assert gaps[1] > gaps[2] + 3 * errors[2]
    if variance == "small":
        assert 3 < gaps[1] / gaps[2] < 6
    elif isinstance(process, VPSDE):  # smooth data: the forward variance costs a fraction
        assert gaps[0] < 0.6


def test_the_continuous_bound_is_the_limit(full3):
    """Richardson's extrapolation from T and 2 T agrees with `elbo`, as does the large variance at one T."""
    model = full3.diffuse(CosineSDE(-10.0, 14.0))
    x = full3.sample(500, seed=3)
    limit = elbo(model, x, draws=200, seed=4).value
    a, b = (ddpm_bound(model, x, steps=n, seed=n).value for n in (200, 400))
    assert float((limit - b).mean()) > 0.3  # far enough for the extrapolation to be tested
    assert abs(float((2 * b - a - limit).mean())) < 4 * float((2 * b - a - limit).std()) / 500**0.5 + 0.02
    large = ddpm_bound(model, x, steps=400, variance="large", seed=5).value
    assert abs(float((large - limit).mean())) < 4 * float((large - limit).std()) / 500**0.5 + 0.03


def exact_code_length(mixture, levels, value_range, k):
    """-log P(k) (B,), nats, of quantized draws of a mixture with diagonal covariances (beyond the range: outermost level)."""
    edges = torch.linspace(*value_range, levels + 1, dtype=torch.float64)
    edges[0], edges[-1] = -math.inf, math.inf
    std = mixture.covariances.diagonal(dim1=1, dim2=2).sqrt()
    mass = torch.special.ndtr((edges - mixture.means[..., None]) / std[..., None]).diff(dim=-1).log()
    rows = torch.arange(k.shape[1])
    joint = torch.stack([m[rows, k].sum(1) for m in mass], 1) + mixture.weights.log()
    return -torch.logsumexp(joint, 1)


def centres_model(mixture, levels, value_range, sde):
    """The exact model of quantized draws: a mixture of (nearly) points at the centres of all combinations of levels."""
    d = mixture.means.shape[1]
    k = torch.cartesian_prod(*[torch.arange(levels)] * d)
    probability = (-exact_code_length(mixture, levels, value_range, k)).exp()
    centres = dequantize(k, levels, value_range, torch.full(k.shape, 0.5, dtype=torch.float64))
    return GaussianMixture.isotropic(centres, 1e-4, probability / probability.sum()).diffuse(sde)


def test_integers_cost_more_than_their_exact_code_length():
    """The exact model of the integers: in the mean over data the bound is above the entropy, and close with many steps."""
    mixture = GaussianMixture(
        [0.6, 0.4], [[0.3, -0.2], [-0.4, 0.3]], [[[0.04, 0.0], [0.0, 0.09]], [[0.05, 0.0], [0.0, 0.03]]]
    )
    levels, ends, n = 5, (-1.0, 1.0), 800
    k = quantize(mixture.sample(n, seed=0), levels, ends)
    exact = exact_code_length(mixture, levels, ends, k)
    model = centres_model(mixture, levels, ends, VPSDE(t_min=1e-3))
    gaps = []
    for steps in (20, 80, 320):
        got = ddpm_bound(model, k, steps=steps, levels=levels, value_range=ends, seed=1)
        gap = -got.value - exact
        assert z_of(gap) > -3
        gaps.append(float(gap.mean()))
        assert float(got.reconstruction.max()) < 1e-3  # noise of 0.01 in intervals of 0.4
        assert float(got.reconstruction.min()) >= 0
    assert gaps[0] > 2 * gaps[1] > 0
    assert gaps[2] < 0.1
    bits = got.bits_per_dim
    assert set(bits) == {"prior", "diffusion", "reconstruction", "total"}
    torch.testing.assert_close(bits["total"], bits["prior"] + bits["diffusion"] + bits["reconstruction"])
    torch.testing.assert_close(bits["total"], -got.value / (2 * LOG2))


def test_the_decoder_of_integers():
    """A denoiser that answers a constant: masses of a normal about it, the outermost levels to infinity; they sum to 1."""

    class Constant(nn.Module):
        def forward(self, x, label):
            return torch.full_like(x, 0.13)

    edges = torch.tensor([-math.inf, -0.5, 0.0, 0.5, math.inf], dtype=torch.float64)
    for t in (0.05, 0.3):  # noise within the range, and beyond it
        sde = VPSDE(t_min=t)
        model = ScoreNet(Constant(), sde, "denoise", levels=4, value_range=(-1.0, 1.0)).double()
        got = ddpm_bound(model, torch.arange(4)[:, None], steps=3, seed=0)
        mass = torch.special.ndtr((edges - 0.13) / float(sde.sigma(t) / sde.alpha(t))).diff()
        torch.testing.assert_close(got.reconstruction, -mass.log(), rtol=1e-4, atol=1e-6)
        assert float((-got.reconstruction).exp().sum()) == pytest.approx(1, abs=1e-6)
    # so far out that the masses underflow, their logarithms do not
    far = ddpm_bound(ScoreNet(Constant(), VPSDE(), "denoise", levels=4), torch.tensor([[0], [3]]), steps=3, seed=0)
    r = float(VPSDE().sigma(1e-5))
    for got, distance in zip(far.reconstruction.tolist(), (0.63, 0.37), strict=True):
        assert got == pytest.approx(0.5 * (distance / r) ** 2, rel=1e-2)


def test_standard_errors_are_calibrated(full3):
    """Spread over seeds against `stderr`: all steps, several samples, subsampled steps, another grid."""
    model, x = full3.diffuse(VPSDE()), full3.sample(48, seed=4)
    for options in (
        {"steps": 30},
        {"steps": 20, "samples_per_step": 3},
        {"steps": 200, "steps_per_example": 15},
        {"steps": 200, "steps_per_example": 8, "samples_per_step": 3},
        {"steps": 40, "variance": "large", "grid": grids.karras},
    ):
        results = [ddpm_bound(model, x, seed=s, **options) for s in range(20)]
        observed = torch.stack([r.value for r in results]).var(0).mean().sqrt()
        reported = torch.stack([r.stderr for r in results]).square().mean().sqrt()
        assert 0.8 < float(observed / reported) < 1.25, options


@pytest.mark.parametrize("options", [{}, {"steps_per_example": 5, "samples_per_step": 2}], ids=["whole", "drawn"])
def test_a_bound_depends_on_its_example_and_its_seed_alone(options, full3):
    """33 rows at once, one by one, and among others; equal rows with equal seeds have equal, finite bounds."""
    model, x = full3.diffuse(VPSDE()), full3.sample(33, seed=11)
    seeds = [7 * i + 3 for i in range(33)]
    whole = ddpm_bound(model, x, steps=20, seed=seeds, **options)
    alone = [ddpm_bound(model, x[i : i + 1], steps=20, seed=seeds[i : i + 1], **options) for i in range(33)]
    among = ddpm_bound(model, torch.cat([100 * x[:5], x[20:]]), steps=20, seed=[1, 2, 3, 4, 5, *seeds[20:]], **options)
    for name in ("value", "stderr", "diffusion", "reconstruction", "prior"):
        values = getattr(whole, name)
        torch.testing.assert_close(torch.cat([getattr(r, name) for r in alone]), values, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(getattr(among, name)[5:], values[20:], rtol=1e-10, atol=1e-10)
    same = ddpm_bound(model, x[:1].expand(32, 3), steps=20, seed=[5] * 32, **options).value
    assert bool(torch.isfinite(same).all())
    torch.testing.assert_close(same, same[:1].expand(32), rtol=1e-12, atol=0)


def test_the_control_variates_are_unbiased_and_help(full3, monkeypatch):
    """Without them the same mean in a z-test, and a variance that is several times larger."""
    model, x = full3.diffuse(VPSDE()), full3.sample(400, seed=5)
    with_them = ddpm_bound(model, x, steps=30, seed=0).diffusion
    monkeypatch.setattr(ddpm, "controlled", lambda ratio, *rest: ratio)
    without = ddpm_bound(model, x, steps=30, seed=1).diffusion
    spread = float((without - with_them).std())
    assert abs(float((without - with_them).mean())) < 4 * spread / 20
    assert float(without.var() / with_them.var()) > 2


def test_subsampled_steps_are_unbiased():
    """Strata of unequal size, and of two or three steps each: in the mean what all steps give, in closed form."""
    sde, std = VPSDE(), 0.5
    x = normal(std).sample(600, seed=5)
    for steps, drawn in ((100, 7), (9, 3), (12, 6)):
        got = ddpm_bound(normal(std).diffuse(sde), x, steps=steps, steps_per_example=drawn, seed=1)
        t = got.times.tolist()
        whole = sum(expected_step(sde, std, x, t[i], t[i + 1], "small") for i in range(steps))
        assert abs(z_of(got.diffusion - whole)) < 4
        assert tuple(got.steps.shape) == (drawn, 600)
        assert got.nfe == drawn + 4


def test_a_worse_model_has_a_lower_bound(full3):
    """The denoiser of a standard normal, on other data: below the truth by the KL divergence at least."""
    torch.manual_seed(0)
    model = ScoreNet(MLP(3, width=8, depth=1), VPSDE(), "edm")
    x = full3.sample(400, seed=1)
    bound = ddpm_bound(model, x, steps=200, variance="large", seed=2).value
    gaussian = -0.5 * x.square().sum(1) - 1.5 * math.log(2 * math.pi)
    assert abs(float((bound - gaussian).mean())) < 4 * float((bound - gaussian).std()) / 20 + 0.03
    assert float(bound.mean()) < float(full3.log_prob(x).mean()) - 0.1


def test_grids_and_seeds(full3):
    """Any grid of the package; a seed decides everything; the global random state is untouched; float32 stays close."""
    model, x = full3.diffuse(VPSDE()), full3.sample(20, seed=8)
    before = torch.get_rng_state()
    for grid in (grids.uniform_time, grids.karras, grids.given([1.0, 0.5, 0.1, 0.01])):
        steps = 3
        a, b, c = (ddpm_bound(model, x, steps=steps, grid=grid, seed=s) for s in (1, 1, 2))
        assert torch.equal(a.times, grid(model.sde, steps))
        assert torch.equal(a.value, b.value)
        assert torch.equal(a.stderr, b.stderr)
        assert not torch.equal(a.value, c.value)
    assert torch.equal(before, torch.get_rng_state())
    seeds = list(range(12))
    one = ddpm_bound(model, x[:12], steps=4, steps_per_example=2, seed=seeds)
    part = ddpm_bound(model, x[4:7], steps=4, steps_per_example=2, seed=seeds[4:7])
    torch.testing.assert_close(one.value[4:7], part.value)
    low = ddpm_bound(model, x.float(), steps=4, seed=1)
    assert low.value.dtype == torch.float64


def test_few_examples(full3):
    """One example knows its error from its own steps, or samples; one step with one sample leaves none; no examples work."""
    model, x = full3.diffuse(VPSDE()), full3.sample(3, seed=9)
    for steps, samples in ((2, 1), (3, 1), (5, 1), (5, 2), (1, 2)):
        one = ddpm_bound(model, x[:1], steps=steps, samples_per_step=samples, seed=0)
        assert bool(torch.isfinite(one.value).all())
        assert bool(torch.isfinite(one.stderr).all())
    none = ddpm_bound(model, x[:0], steps=5, seed=0)
    assert tuple(none.value.shape) == tuple(none.stderr.shape) == (0,)
    assert tuple(none.steps.shape) == (5, 0)
    single = ddpm_bound(model, x, steps=1, seed=0)
    assert bool(torch.isfinite(single.value).all())
    assert bool(single.stderr.isnan().all())


def test_conditions_reach_the_network():
    """cond is handed over row by row, and one of the wrong length is refused."""
    torch.manual_seed(0)
    net = MLP(2, width=8, depth=1, cond_dim=1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model = ScoreNet(net, VPSDE(), "edm")
    x = torch.zeros(4, 2)
    zero, ones = (ddpm_bound(model, x, steps=4, seed=0, cond=c).value for c in (torch.zeros(4, 1), torch.ones(4, 1)))
    assert float((zero - ones).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="cond"):
        ddpm_bound(model, x, steps=4, cond=torch.zeros(3, 1))


def test_bad_arguments(full3):
    """Steps, grids, levels, data."""
    model, x = full3.diffuse(VPSDE()), full3.sample(3, seed=9)
    for options, message in (
        ({"steps": 0}, "steps"),
        ({"samples_per_step": 0}, "samples_per_step"),
        ({"steps": 4, "steps_per_example": 5}, "at most steps"),
        ({"variance": "learned"}, "small, large"),
        ({"levels": 256}, "floating point"),
        ({"value_range": (0.0, 1.0)}, "floating point"),
        ({"steps": 4, "grid": grids.given([1.0, 0.1])}, "1 steps"),
        ({"steps": 4, "grid": lambda sde, steps: torch.linspace(0, 1, steps + 1)}, "decreasing"),
    ):
        with pytest.raises(ValueError, match=message):
            ddpm_bound(model, x, **options)
    with pytest.raises(TypeError, match="ScoreModel"):
        ddpm_bound(MLP(3), x)
    with pytest.raises(ValueError, match="shape"):
        ddpm_bound(model, x[:, :2])
    with pytest.raises(ValueError, match="t_min > 0"):
        ddpm_bound(full3.diffuse(VPSDE(t_min=0.0)), x, steps=4)
    with pytest.raises(ValueError, match="levels is not given"):
        ddpm_bound(model, torch.tensor([[0, 1, 2]]), steps=4)
    with pytest.raises(ValueError, match="batch axis"):
        ddpm_bound(model, torch.tensor([0, 1, 255]), steps=4)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        ddpm_bound(model, torch.tensor([[0, 1, 4]]), levels=4, steps=4)
    known = ScoreNet(MLP(3, width=4, depth=1), VPSDE(), levels=8)
    with pytest.raises(ValueError, match="8 levels, got levels=4"):
        ddpm_bound(known, torch.tensor([[0, 1, 2]]), levels=4)


def test_scaled_integers_are_warned_about():
    """Floats on a grid: the density of such data has no finite best value."""
    model = normal(0.5, 16).diffuse(VPSDE())
    k = torch.randint(0, 16, (40, 16), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="16 levels"):
        ddpm_bound(model, k / 7.5 - 1, steps=2, seed=0)


def test_nan_from_the_network_is_named():
    """The rows for which it answered NaN; and its training mode is as it was, also after the error."""

    class Sick(MLP):
        def forward(self, x, label, cond=None):
            out = super().forward(x, label, cond)
            return torch.where(torch.arange(len(x))[:, None] == 2, math.nan, out)

    model = ScoreNet(Sick(2, width=4, depth=1), VPSDE()).train()
    with pytest.raises(NonFiniteError, match=r"NaN or infinity at t = 1, examples \[2\]"):
        ddpm_bound(model, torch.zeros(4, 2), steps=3, seed=0)
    assert all(m.training for m in model.modules())


@pytest.mark.cuda
def test_on_a_gpu(full3):
    """All steps and subsampled, floats and integers: what the CPU gives, up to the noise."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    x = full3.sample(64, seed=0)
    model = full3.diffuse(VPSDE())
    for options in ({}, {"steps_per_example": 10, "samples_per_step": 2}):
        cpu = ddpm_bound(model.cpu(), x, steps=40, seed=0, **options)
        gpu = ddpm_bound(model.cuda(), x.cuda(), steps=40, seed=0, **options)
        assert gpu.value.device.type == "cuda"
        difference = gpu.value.cpu() - cpu.value
        assert abs(z_of(difference)) < 4
    k = torch.randint(0, 8, (16, 3), generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(ddpm_bound(model.cuda(), k, levels=8, steps=5, seed=0).value).all())
