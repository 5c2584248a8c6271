"""Log densities by the probability flow, their estimators, and bits/dim, against closed forms."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from scoresde import (
    VPSDE,
    Divergence,
    Exact,
    GaussianMixture,
    Hadamard,
    Hutchinson,
    NonFiniteError,
    RectifiedFlow,
    ScoreNet,
    bits_per_dim,
    decode,
    encode,
    log_prob,
    sample,
)
from scoresde.likelihood import (
    AngleWarp,
    HutchPlusPlus,
    LikelihoodPlan,
    bits_from_nats,
    default_divergence,
    dequantize,
    quantize,
)
from scoresde.nets import MLP
from scoresde.ode import MAX_NFE, OK
from scoresde.rng import RandomSource, derive, spawn

# -- against the closed form -----------------------------------------------------------------------------------------


def test_exact_trace_at_default_tolerance(sde, ring8):
    """Mean error below 1e-3 nats against the mixture's own density at t_min, on data of mean zero, in 2D."""
    model, x = ring8.diffuse(sde), ring8.sample(64, seed=1)
    got = log_prob(model, x)
    error = (got.value - model.log_prob(x, sde.t_min)).abs()
    assert float(error.mean()) < 1e-3
    assert got.value.dtype == torch.float64
    assert (got.status == OK).all()
    assert (got.stderr == 0).all()
    assert got.latent.shape == x.shape
    assert (got.nfe > 10).all()
    # the latents follow the prior: their squared norm is chi-squared with 2 degrees of freedom
    assert float((got.latent / sde.prior_std).square().sum(1).mean()) == pytest.approx(2, abs=4 * 2 / 8)


def test_exact_trace_at_a_tight_tolerance(sde, full3):
    """An exact model ends with its own density at t = 1, so at rtol 1e-8 nothing but 2e-6 nats remains."""
    model, x = full3.diffuse(sde), full3.sample(8, seed=1)
    got = log_prob(model, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.value, model.log_prob(x, sde.t_min), rtol=0, atol=2e-6)


def test_a_network_ends_with_the_prior(full3):
    """The same denoiser as a network: its value differs by log prior - log p_1 at the latent, which is not zero."""
    sde = VPSDE()
    truth, x = full3.diffuse(sde), full3.sample(8, seed=1)

    class Denoiser(nn.Module):
        def forward(self, x, label):
            return truth.denoise(x, label)

    got = log_prob(ScoreNet(Denoiser(), sde, "denoise"), x, rtol=1e-8, atol=1e-8)
    mismatch = sde.prior_log_prob(got.latent) - truth.log_prob(got.latent, 1.0)
    assert float(mismatch.abs().max()) > 1e-4
    torch.testing.assert_close(got.value - mismatch, truth.log_prob(x, sde.t_min), rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "bosh3"])
def test_error_follows_the_tolerance(ring8, method):
    """Tightening rtol and atol tightens the value, and costs more evaluations."""
    sde = VPSDE()
    model, x = ring8.diffuse(sde), ring8.sample(16, seed=2)
    exact = log_prob(model, x, rtol=1e-9, atol=1e-9).value
    errors, costs = [], []
    for tol in (1e-3, 1e-5):
        got = log_prob(model, x, rtol=tol, atol=tol, method=method)
        errors.append(float((got.value - exact).abs().mean()))
        costs.append(float(got.nfe.double().mean()))
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 1e-3
    assert costs[1] > costs[0]


def test_far_points(ring8):
    """Points of very low density are as exact."""
    model = ring8.diffuse(VPSDE())
    x = torch.tensor([[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    got = log_prob(model, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.value, model.log_prob(x, 1e-5), rtol=0, atol=1e-4)


def test_images(sde, image16):
    """An image-shaped event, exact trace: the mixture's density of the whole image."""
    model, x = image16.diffuse(sde), image16.sample(8, seed=1)
    got = log_prob(model, x)
    torch.testing.assert_close(got.value, model.log_prob(x, sde.t_min), rtol=0, atol=2e-2)
    assert got.latent.shape == (8, 1, 4, 4)


def test_float32_and_float64_agree(ring8):
    """float32 data give the float64 value to float32 precision, and a float64 result."""
    model, x = ring8.diffuse(VPSDE()), ring8.sample(8, seed=1)
    got = log_prob(model, x.float())
    assert got.value.dtype == torch.float64
    assert got.latent.dtype == torch.float32
    torch.testing.assert_close(got.value, log_prob(model, x.float().double()).value, rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_data(ring8, dtype):
    """Data in half precision are solved in float32: the state of a solver never is half."""
    model, x = ring8.diffuse(VPSDE()), ring8.sample(8, seed=1).to(dtype)
    got = log_prob(model, x)
    assert got.latent.dtype == torch.float32
    torch.testing.assert_close(got.value, log_prob(model, x.double()).value, rtol=0, atol=5e-3)
    assert encode(model, x).dtype == torch.float32


def test_on_each_device(ring8, device):
    """The value does not depend on where it is computed."""
    model, x = ring8.diffuse(VPSDE()), ring8.sample(8, seed=1)
    expected = log_prob(model, x).value
    got = log_prob(model.to(device), x.to(device))
    assert got.value.device.type == device
    torch.testing.assert_close(got.value.cpu(), expected, rtol=0, atol=1e-5)


def test_rows_do_not_feel_their_batch(ring8):
    """Alone, in a batch, in another order: the same values and the same work, with one seed per row for the probes."""
    model, x = ring8.diffuse(VPSDE()), ring8.sample(6, seed=1)
    kind = dict(divergence=Hutchinson(2))
    whole = log_prob(model, x, seed=[1, 2, 3, 4, 5, 6], **kind)
    flipped = log_prob(model, x.flip(0), seed=[6, 5, 4, 3, 2, 1], **kind)
    torch.testing.assert_close(flipped.value.flip(0), whole.value, rtol=0, atol=1e-8)
    alone = log_prob(model, x[2:3], seed=[3], **kind)
    torch.testing.assert_close(alone.value, whole.value[2:3], rtol=0, atol=1e-8)
    assert int(alone.nfe) == int(whole.nfe[2])


def test_agrees_with_torchdiffeq(full3):
    """An independent solve in the original coordinates, d log p/dt = -tr(dv/dx), gives the same number."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    sde = VPSDE(t_min=1e-3)
    model, x = full3.diffuse(sde), full3.sample(4, seed=3)

    def rhs(t, state):
        y = state[0].detach().requires_grad_(True)
        with torch.enable_grad():
            v = model.velocity(y, t.clamp(0, 1))
            trace = sum(torch.autograd.grad(v[:, i].sum(), y, retain_graph=True)[0][:, i] for i in range(3))
        return v.detach(), -trace

    ends = torch.tensor([sde.t_min, 1.0], dtype=torch.float64)
    y, change = torchdiffeq.odeint(
        rhs, (x, torch.zeros(4, dtype=torch.float64)), ends, rtol=1e-8, atol=1e-8, method="dopri5"
    )
    got = log_prob(model, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.latent, y[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.value, model.log_prob(y[-1], 1.0) - change[-1], rtol=0, atol=1e-5)


# -- the trace -------------------------------------------------------------------------------------------------------


class Field(nn.Module):
    """v(u) = tanh(u M^T) M2 on flattened events, whose Jacobian is known."""

    def __init__(self, event):
        super().__init__()
        d = math.prod(event)
        g = torch.Generator().manual_seed(0)
        self.a, self.b = torch.randn(2, d, d, generator=g, dtype=torch.float64) / d**0.5

    def forward(self, u):
        return (torch.tanh(u.flatten(1) @ self.a.T) @ self.b).reshape(u.shape)

    def trace(self, u):
        slope = 1 - torch.tanh(u.flatten(1) @ self.a.T) ** 2
        return torch.einsum("ki,bk,ki->b", self.a, slope, self.b)


@pytest.mark.parametrize("event", [(1,), (5,), (1, 3, 3), (2, 2, 2, 2)])
def test_exact_divergence(event):
    """The exact trace of a Jacobian, for events of any shape, also from a non-contiguous output."""
    field = Field(event)
    u = torch.randn(4, *event, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v, trace = Exact()(field, u, None)
    torch.testing.assert_close(v, field(u))
    torch.testing.assert_close(trace, field.trace(u)[:, None])
    assert not v.requires_grad
    if len(event) == 3:
        swapped = lambda w: field(w.transpose(-1, -2).contiguous()).transpose(-1, -2)  # noqa: E731
        torch.testing.assert_close(Exact()(swapped, u, None)[1][:, 0], field.trace(u.transpose(-1, -2).contiguous()))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_divergence(distribution):
    """z^T J z averages to the trace; Rademacher probes are +-1, Gaussian ones N(0, 1); v is the field itself."""
    field = Field((6,))
    u = torch.randn(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    many = Hutchinson(4000, distribution)
    z = many.probes((1, 6), torch.float64, RandomSource(0, "cpu", 1))
    assert z.shape == (1, 4000, 6)
    v, traces = many(field, u, z)
    torch.testing.assert_close(v, field(u))
    error = float(traces.std()) / 4000**0.5
    assert float(traces.mean()) == pytest.approx(float(field.trace(u)), abs=4 * error)
    if distribution == "rademacher":
        assert set(z.unique().tolist()) == {-1.0, 1.0}
    else:
        assert float(z.var()) == pytest.approx(1, abs=0.05)


def test_default_divergence():
    """Exact in small dimensions, two sign vectors with four orthogonal probes each beyond."""
    assert isinstance(default_divergence(32), Exact)
    assert isinstance(default_divergence(33), Hadamard)
    assert (default_divergence(33).count, default_divergence(33).replicates) == (8, 2)


@pytest.fixture(scope="module")
def repeated(image16):
    """300 estimates with four probes each of the log density of one image, and the exact value."""
    model, x = image16.diffuse(VPSDE()), image16.sample(1, seed=1)
    tolerance = dict(rtol=1e-4, atol=1e-4)
    got = log_prob(model, x.expand(300, 1, 4, 4), divergence=Hutchinson(4), seed=spawn(0, 300), **tolerance)
    return got, float(log_prob(model, x, divergence=Exact(), **tolerance).value)


def test_hutchinson_is_unbiased(repeated):
    """The mean over seeds is the exact trace's value."""
    got, exact = repeated
    error = float(got.value.std()) / 300**0.5
    assert error > 0
    assert abs(float(got.value.mean()) - exact) < 3.5 * error + 1e-3


def test_standard_error_is_calibrated(repeated):
    """The reported standard error is the scatter that is observed, within a quarter."""
    got, _ = repeated
    assert 0.8 < float(got.value.std()) / float(got.stderr.square().mean().sqrt()) < 1.25


def test_one_probe_knows_no_error(image16):
    """A single probe reports NaN as its standard error, not 0."""
    x = image16.sample(2, seed=0)
    got = log_prob(image16.diffuse(VPSDE()), x, divergence=Hutchinson(1), seed=0, rtol=1e-2, atol=1e-2)
    assert torch.isnan(got.stderr).all()
    assert torch.isfinite(got.value).all()


def test_seeds_of_the_probes(image16):
    """The same seed gives the same value; another one another."""
    model, x = image16.diffuse(VPSDE()), image16.sample(3, seed=1)
    a, b, c = (log_prob(model, x, divergence=Hutchinson(2), seed=s, rtol=1e-3, atol=1e-3).value for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert (a != c).all()
    with pytest.raises(ValueError, match="got 2 seeds for a batch of 3"):
        log_prob(model, x, divergence=Hutchinson(2), seed=[1, 2])


def test_probes_are_drawn_once(ring8):
    """Every evaluation of a coupled solve sees the same probes for the same example, also after others have finished."""
    seen = {}

    class Watching(Hutchinson):
        def __call__(self, velocity, u, probes):
            for row in probes:
                seen.setdefault(tuple(row.flatten().tolist()), 0)
                seen[tuple(row.flatten().tolist())] += 1
            return super().__call__(velocity, u, probes)

    got = log_prob(
        ring8.diffuse(VPSDE()), ring8.sample(4, seed=0), divergence=Watching(2, "gaussian"), seed=0, method="tsit5"
    )
    assert sorted(seen.values()) == sorted(got.nfe.tolist())


# -- encode, decode, sample ------------------------------------------------------------------------------------------


def test_round_trip(sde, full3):
    """decode(encode(x)) = x up to the tolerances, float64, and encode is log_prob's latent."""
    model, x = full3.diffuse(sde), full3.sample(16, seed=1)
    z = encode(model, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(decode(model, z, rtol=1e-8, atol=1e-8), x, rtol=0, atol=1e-5)
    latent = log_prob(model, x, rtol=1e-8, atol=1e-8).latent
    torch.testing.assert_close(latent / sde.prior_std, z / sde.prior_std, rtol=0, atol=1e-5)


def test_return_log_prob(sde, ring8):
    """Samples come with their log densities, which are the mixture's, from one solve; they are those without, to tolerance."""
    model = ring8.diffuse(sde)
    x, value = sample(model, (32, 2), method="ode", seed=3, return_log_prob=True)
    torch.testing.assert_close(x, sample(model, (32, 2), method="ode", seed=3), rtol=0, atol=5e-3)
    assert value.shape == (32,)
    error = (value - model.log_prob(x, sde.t_min)).abs()
    assert float(error.mean()) < 1e-2
    # and over the batch their mean is minus the entropy
    entropy = -float(ring8.log_prob(ring8.sample(4000, seed=9)).mean())
    assert float(-value.mean()) == pytest.approx(entropy, abs=0.8)


# -- bits per dimension ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels(image16):
    """Twelve 8-bit images of the mixture."""
    return quantize(image16.sample(12, seed=5), 256, (-1.0, 1.0)).to(torch.uint8)


def test_bits_per_dim_by_the_formula(image16, pixels):
    """-log2 p(x) / d + log2(levels / (high - low)) with the exact density at the same dequantized points."""
    model = image16.diffuse(VPSDE())
    got = bits_per_dim(model, pixels, levels=256, seed=7, divergence=Exact())
    u = RandomSource([derive(s, 1) for s in spawn(7, 12)], "cpu", 12).uniform(pixels.shape, torch.float32)
    x = -1 + 2 * (pixels.float() + u) / 256
    expected = -model.log_prob(x, 1e-5) / math.log(2) / 16 + math.log2(256 / 2)
    torch.testing.assert_close(got.per_example, expected, rtol=0, atol=3e-3)
    assert got.mean == pytest.approx(float(expected.mean()), abs=2e-3)
    assert got.stderr == pytest.approx(float(expected.std()) / 12**0.5, rel=0.05)
    assert (got.status == OK).all()
    assert (got.trace_stderr == 0).all()
    assert got.nfe > 10


def test_bits_from_nats_by_hand():
    """Uniform density 1/2 on [-1, 1) in each of 3 dimensions: 8 levels cost 3 bits each, whatever the scale."""
    for low, high in ((-1.0, 1.0), (0.0, 255.0)):
        nats = torch.tensor([-3 * math.log(high - low)], dtype=torch.float64)
        assert float(bits_from_nats(nats, 3, 8, (low, high))) == pytest.approx(3.0, abs=1e-12)


def test_bits_per_dim_bounds_the_true_code_length():
    """In 1D the probability of a level is an integral of the density: the bound holds and is nearly tight."""
    mixture = GaussianMixture.isotropic([[-0.4], [0.3]], 0.2)
    low, high, levels = -1.5, 1.5, 8
    edges = torch.linspace(low, high, levels + 1, dtype=torch.float64)
    cdf = torch.special.ndtr((edges[:, None] - mixture.means.flatten()) / 0.2) @ mixture.weights
    probability = torch.diff(cdf)
    k = quantize(mixture.sample(400, seed=0), levels, (low, high))
    got = bits_per_dim(mixture.diffuse(VPSDE()), k, levels=levels, value_range=(low, high), seed=0)
    truth = float(-torch.log2(probability[k.flatten()]).mean())
    assert truth - 3 * got.stderr < got.mean
    assert got.mean < truth + 0.4


def test_bits_per_dim_does_not_depend_on_the_batch_size(image16, pixels):
    """One by one, in uneven parts or all at once: the same per example."""
    model = image16.diffuse(VPSDE())
    options = dict(levels=256, seed=1, divergence=Hutchinson(2), rtol=1e-3, atol=1e-3)
    whole = bits_per_dim(model, pixels, **options)
    for size in (1, 5):
        got = bits_per_dim(model, pixels, batch_size=size, **options)
        torch.testing.assert_close(got.per_example, whole.per_example, rtol=0, atol=1e-4)
    assert bits_per_dim(model, pixels, **options).mean == whole.mean
    other = bits_per_dim(model, pixels, **{**options, "seed": 2})
    assert not torch.allclose(other.per_example, whole.per_example, rtol=0, atol=1e-4)


def test_bits_per_dim_of_a_loader(image16, pixels):
    """A loader of batches, of single-entry tuples, a generator and an array give what the tensor gives."""
    model = image16.diffuse(VPSDE())
    options = dict(seed=1, rtol=1e-2, atol=1e-2)
    expected = bits_per_dim(model, pixels, **options).per_example
    loaders = (
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels), batch_size=5),
        [pixels[:5], pixels[5:]],
        (p for p in pixels.split(7)),
        pixels.numpy(),
        pixels.to(torch.int64),
    )
    for loader in loaders:
        got = bits_per_dim(model, loader, **options).per_example
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="cond"):
        bits_per_dim(model, [pixels], cond=torch.arange(12))


def test_labels_of_a_loader_are_never_dropped_silently():
    """(data, labels): the condition, or ignored, as `cond` says; refused where it says nothing, in a message with both."""

    class Shift(nn.Module):
        def forward(self, x, label, cond=None):
            return 0.3 * x + (0.0 if cond is None else 0.5 * cond[:, None])

    model = ScoreNet(Shift(), VPSDE(t_min=1e-3), "edm", levels=4)
    k, labels = torch.tensor([[0, 1], [2, 3], [1, 1]]), torch.tensor([0.0, 1.0, -2.0])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(k, labels), batch_size=2)
    options = dict(seed=3, rtol=1e-2, atol=1e-2)
    conditional = bits_per_dim(model, loader, cond="loader", **options).per_example
    expected = bits_per_dim(model, k, cond=labels, **options).per_example
    torch.testing.assert_close(conditional, expected, rtol=0, atol=1e-5)
    ignored = bits_per_dim(model, loader, cond="ignore", **options).per_example
    torch.testing.assert_close(ignored, bits_per_dim(model, k, **options).per_example, rtol=0, atol=1e-5)
    assert float((conditional - ignored).abs().max()) > 0.05
    with pytest.raises(ValueError, match=r'2 entries.*cond="loader".*cond="ignore"'):
        bits_per_dim(model, loader, **options)
    for batches, cond in (
        ([(k,)], "loader"),
        ([(k, labels, labels)], "loader"),
        ([k], "loader"),
        ([k], "labels"),
        ([k], labels),
    ):
        with pytest.raises(ValueError, match="cond"):
            bits_per_dim(model, batches, cond=cond, **options)
    for cond in ("loader", "ignore"):
        with pytest.raises(ValueError, match="goes with a loader"):
            bits_per_dim(model, k, cond=cond, **options)
    with pytest.raises(ValueError, match="one row per example"):
        bits_per_dim(model, [(k, labels[:2])], cond="loader", **options)


def test_levels_of_the_model():
    """A model that knows its levels and range is asked in them, and refuses others."""

    class Zero(nn.Module):
        def forward(self, x, label):
            return 0.1 * x

    model = ScoreNet(Zero(), VPSDE(), "edm", levels=16, value_range=(0.0, 1.0))
    data = torch.randint(0, 16, (3, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    got = bits_per_dim(model, data, seed=0)
    same = bits_per_dim(model, data, seed=0, levels=16, value_range=(0.0, 1.0))
    assert torch.equal(got.per_example, same.per_example)
    with pytest.raises(ValueError, match="16 levels, got levels=256"):
        bits_per_dim(model, data, levels=256)
    with pytest.raises(ValueError, match=r"0\.\.15 for levels=16, got minimum 0 and maximum 16"):
        bits_per_dim(model, torch.tensor([[[[0, 16], [1, 2]]]]))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 255.0)])
def test_quantize_inverts_dequantize(levels, value_range):
    """Every level comes back, with the least and the largest u; values beyond the range get the outermost level."""
    k = torch.arange(levels)
    for u in (1e-6, 0.5, 1 - 1e-6):
        x = dequantize(k, levels, value_range, torch.full((levels,), u, dtype=torch.float64))
        assert value_range[0] < float(x.min())
        assert float(x.max()) < value_range[1]
        assert torch.equal(quantize(x, levels, value_range), k)
    far = torch.tensor([-1e6, 1e6])
    assert quantize(far, levels, value_range).tolist() == [0, levels - 1]


# -- faults ----------------------------------------------------------------------------------------------------------


def test_bits_per_dim_refuses(image16, pixels):
    """Floats, values out of range, empty sets, seeds and options of the wrong kind."""
    model = image16.diffuse(VPSDE())
    for bad in (pixels.float() / 255, pixels.numpy() / 255.0, pixels > 3, [pixels.float()]):
        with pytest.raises(TypeError, match=r"integers 0\.\.255"):
            bits_per_dim(model, bad)
    for bad, low, high in ((pixels.int() - 300, r"-\d+", r"-?\d+"), (pixels.int() + 200, r"\d+", r"\d+")):
        with pytest.raises(ValueError, match=f"got minimum {low} and maximum {high}"):
            bits_per_dim(model, bad)
    for empty in (pixels[:0], [], iter([])):
        with pytest.raises(ValueError, match="empty"):
            bits_per_dim(model, empty)
    with pytest.raises(ValueError, match=r"\(N, \.\.\.\)"):
        bits_per_dim(model, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="made for examples"):
        bits_per_dim(model, torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    for seed in (None, 1.5, [1, 2], True):
        with pytest.raises(TypeError, match="seed"):
            bits_per_dim(model, pixels, seed=seed)
    for options in (
        {"levels": 0},
        {"value_range": (1.0, -1.0)},
        {"value_range": (0.0, math.nan)},
        {"dequantization": "variational"},
        {"batch_size": 0},
        {"rtol": 0.0},
    ):
        with pytest.raises(ValueError):
            bits_per_dim(model, pixels, **options)


def test_unfinished_examples_are_flagged(image16, pixels, ring8):
    """max_nfe leaves a status, and NaN or what was found with its error; bits/dim warns and leaves them out of the mean."""
    model, x = ring8.diffuse(VPSDE()), ring8.sample(3, seed=0)
    got = log_prob(model, x, max_nfe=20, method="tsit5")
    assert torch.isnan(got.value).all()
    assert (got.status == MAX_NFE).all()
    assert torch.isfinite(got.latent).all()
    got = log_prob(model, x, max_nfe=20)
    assert (got.status == MAX_NFE).all()
    assert (got.nfe <= 20).all()
    assert ((got.value - model.log_prob(x, 1e-5)).abs() < got.trajectory_error + got.quadrature_error).all()
    with pytest.warns(UserWarning, match="12 of 12 examples did not finish"):
        bits = bits_per_dim(image16.diffuse(VPSDE()), pixels, max_nfe=20)
    assert math.isnan(bits.mean)
    assert torch.isnan(bits.per_example).all()
    # budgets between the cheapest and the dearest example: the mean is over those that finish
    whole = bits_per_dim(image16.diffuse(VPSDE()), pixels, seed=0)
    costs = log_prob(image16.diffuse(VPSDE()), -1 + 2 * (pixels.float() + 0.5) / 256, rtol=1e-4, atol=1e-4).nfe
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        part = bits_per_dim(image16.diffuse(VPSDE()), pixels, seed=0, max_nfe=int(costs.double().median()))
    done = part.status == OK
    assert bool(caught) == (not bool(done.all()))
    assert torch.equal(torch.isfinite(part.per_example), done)
    if done.any():
        assert part.mean == pytest.approx(float(whole.per_example[done].mean()), rel=1e-6)


def test_bad_input(ring8):
    """NaN in x names its rows; integer x, wrong shapes, and what is no Divergence."""
    model, x = ring8.diffuse(VPSDE()), ring8.sample(4, seed=0)
    x[1, 0] = math.nan
    with pytest.raises(ValueError, match=r"x holds NaN or infinity in 1 of 4 rows, \[1\]"):
        log_prob(model, x)
    with pytest.raises(TypeError, match="bits_per_dim"):
        log_prob(model, torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(2,\), got \(3,\)"):
        log_prob(model, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="batch axis"):
        log_prob(model, torch.zeros(2))
    with pytest.raises(TypeError, match="torch tensor"):
        log_prob(model, np.zeros((4, 2)))
    for divergence in (Hutchinson, Exact, "exact", 4):
        with pytest.raises(TypeError, match="Divergence"):
            log_prob(model, torch.zeros(4, 2), divergence=divergence)
    for options in ({"rtol": 0.0}, {"atol": -1.0}, {"method": "rk4"}, {"max_nfe": 0}):
        with pytest.raises(ValueError):
            log_prob(model, torch.zeros(4, 2), **options)
    with pytest.raises(ValueError, match="probes"):
        Hutchinson(0)
    with pytest.raises(ValueError, match="rademacher, gaussian"):
        Hutchinson(2, "uniform")
    with pytest.raises(TypeError, match="abstract"):
        Divergence()


def test_empty_batch(image16, ring8):
    """Nothing in, nothing out, of the right shapes, for exact and random traces."""
    for mixture, event in ((ring8, (2,)), (image16, (1, 4, 4))):
        model, x = mixture.diffuse(VPSDE()), torch.zeros(0, *event)
        for divergence in (None, Exact(), Hutchinson(2)):
            got = log_prob(model, x, divergence=divergence, seed=0)
            assert got.value.shape == got.stderr.shape == got.nfe.shape == got.status.shape == (0,)
            assert got.latent.shape == x.shape
        assert encode(model, x).shape == decode(model, x).shape == x.shape


class NaNFrom(nn.Module):
    """NaN for rows whose first entry is negative, at times from `start` on."""

    def __init__(self, start):
        super().__init__()
        self.start = start

    def forward(self, x, label, cond):
        return torch.where((cond & (label >= self.start))[:, None], math.nan, 0.9 * x)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_nan_from_the_network(start):
    """An error that names t and the rows, whether NaN is there at once or met on the way."""
    model = ScoreNet(NaNFrom(start), VPSDE(), "noise")
    marked = torch.tensor([False, False, True, False])
    with pytest.raises(NonFiniteError, match=r"rows \[2\]") as caught:
        log_prob(model, torch.ones(4, 2), cond=marked)
    t = float(str(caught.value).split("t = ")[1].split(",")[0])
    assert t == pytest.approx(max(start, 1e-5), abs=0.02)
    with pytest.raises(NonFiniteError, match=r"rows \[2\]"):
        encode(model, torch.ones(4, 2), cond=marked)


def test_networks_without_a_gradient():
    """no_grad inside the network would give a divergence of 0: an error instead."""

    class Frozen(nn.Module):
        def forward(self, x, label):
            return x.detach()

    class Const(ScoreNet):
        def predict(self, x, t, cond=None):
            return x.detach(), x.detach()

    with pytest.raises(ValueError, match="no_grad"):
        log_prob(Const(Frozen(), VPSDE()), torch.zeros(2, 2))


def test_evaluation_mode():
    """Dropout is off during the solve and the mode is restored; parameters gather no gradients."""
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))
    for i, p in enumerate(net.parameters()):
        nn.init.uniform_(p, -0.3, 0.3, generator=torch.Generator().manual_seed(i))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, label):
            return self.net(x)

    model = ScoreNet(Net(), VPSDE(), "edm").train()
    a, b = (log_prob(model, torch.ones(3, 2), rtol=1e-2, atol=1e-2) for _ in range(2))
    assert torch.equal(a.value, b.value)
    assert not a.value.requires_grad
    assert not a.latent.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert all(m.training for m in model.modules())


def test_levels_that_nobody_declared(device):
    """256 is only the default where the data can be 8-bit: values 0..16 are refused until levels= is said."""
    net = ScoreNet(_Zero(), VPSDE(), "noise").to(device)
    data = torch.randint(0, 17, (3, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="levels is not given"):
        bits_per_dim(net, data)
    assert math.isfinite(bits_per_dim(net, data, levels=17).mean)


@pytest.mark.parametrize("parameterization", ["noise", "score"])
def test_rectified_flow_under_parameterizations_that_divide_by_alpha(parameterization):
    """Their probability flow meets the prior at t_max, where alpha is not 0 yet: finite samples and densities."""
    net = ScoreNet(_Zero(), RectifiedFlow(), parameterization)
    x = sample(net, (3, 2), method="ode", seed=0)
    assert torch.isfinite(x).all()
    assert torch.isfinite(log_prob(net, x).value).all()


def test_probes_are_independent_of_the_noise_of_samples():
    """One seed for a sample and its density: no Gaussian probe is the noise that the sample was drawn from."""
    seen = []

    class Watched(Hutchinson):
        def probes(self, shape, dtype, source):
            seen.append(super().probes(shape, dtype, source))
            return seen[-1]

    model, noise = (
        GaussianMixture.isotropic([[0.0] * 5], 1.0).diffuse(VPSDE()),
        RandomSource(3, "cpu", 2).normal((2, 1, 5), torch.float64),
    )
    for method in ("decoupled", "tsit5"):
        log_prob(model, torch.ones(2, 5, dtype=torch.float64), divergence=Watched(1, "gaussian"), seed=3, method=method)
    assert len(seen) > 20
    assert not any(torch.equal(probes, noise) for probes in seen)


def test_conditions_of_the_wrong_length_are_refused():
    """One row per example, in sample, log_prob and bits_per_dim: nothing is cut to fit."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 1.0).diffuse(VPSDE())
    for rows in (2, 5):
        with pytest.raises(ValueError, match="one row per example"):
            log_prob(model, torch.zeros(3, 2), cond=torch.zeros(rows, 1))
        with pytest.raises(ValueError, match="one row per example"):
            sample(model, (3, 2), method="ode", cond=torch.zeros(rows, 1))


class _Zero(torch.nn.Module):
    """A network that says 0 times x, differentiably."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, label):
        return self.scale * x


def test_return_log_prob_from_another_start(sde, ring8):
    """From t_max the Gaussian that is drawn there is what the density starts with; from an x_init below the end it is refused."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 0.5).diffuse(sde)  # its marginal is that Gaussian
    x, value = sample(model, (16, 2), method="ode", seed=3, t_max=0.5, return_log_prob=True)
    torch.testing.assert_close(value, model.log_prob(x, sde.t_min), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="not known"):
        sample(model, (2, 2), method="ode", grid=[0.5, sde.t_min], x_init=torch.zeros(2, 2), return_log_prob=True)


def test_options_of_the_wrong_kind():
    """Numbers, names and classes where something else belongs: refused at once, and named."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 0.5).diffuse(VPSDE())
    x, k = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([[0, 255], [3, 4]])
    warp = AngleWarp(0.1, 0.1)
    for error, match, call in (
        (TypeError, "differentiable", lambda: log_prob(model, x, differentiable=1)),
        (TypeError, "divergence", lambda: log_prob(model, x, divergence=Exact)),
        (TypeError, "divergence", lambda: bits_per_dim(model, k, divergence=Exact)),
        (TypeError, "divergence", lambda: bits_per_dim(model, k, divergence="exact")),
        (TypeError, "plan", lambda: bits_per_dim(model, k, plan=3)),
        (TypeError, "data must be integers", lambda: bits_per_dim(model, 3)),
        (TypeError, "data must be integers", lambda: bits_per_dim(model, None)),
        (ValueError, "levels must be", lambda: bits_per_dim(model, k, levels=10**20)),
        (ValueError, "value_range", lambda: bits_per_dim(model, k, value_range=(0.0, math.inf))),
        (TypeError, "probes", lambda: Hutchinson(True)),
        (ValueError, "probes", lambda: Hutchinson(0)),
        (TypeError, "probes", lambda: HutchPlusPlus(1.5)),
        (TypeError, "nodes", lambda: LikelihoodPlan(warp, True, warp, 4)),
        (ValueError, "nodes must be at least 2 and at most", lambda: LikelihoodPlan(warp, 10**6, warp, 4)),
        (TypeError, "AngleWarp", lambda: LikelihoodPlan(1, 4, warp, 4)),
        (TypeError, "quadrature_error", lambda: LikelihoodPlan(warp, 4, warp, 4, "small")),
        (TypeError, "levels", lambda: quantize(x, 1.5, (-1.0, 1.0))),
        (ValueError, "value_range", lambda: dequantize(k, 256, (1.0, 1.0), torch.rand(2, 2))),
        (ValueError, "d must be", lambda: bits_from_nats(x[:, 0], 0, 256, (-1.0, 1.0))),
    ):
        with pytest.raises(error, match=match):
            call()


def test_tolerances_beyond_float64_end():
    """1e-300 asks for no more points than float64 has digits for."""
    mixture = GaussianMixture.isotropic([[0.0, 0.0]], 0.5)
    got = log_prob(mixture.diffuse(VPSDE()), mixture.sample(1, seed=0), rtol=1e-300, atol=1e-300)
    assert int(got.nfe) < 5000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_low_precision_network_leaves_is_said(dtype):
    """Its log densities beside those of the same weights in float64: within the error it reports, and a warning says so once."""
    torch.manual_seed(0)
    net = MLP(4, width=32, depth=2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    low = ScoreNet(net.to(dtype), VPSDE(), "edm", sigma_data=0.7)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    options = dict(rtol=3e-5, atol=3e-5)
    with pytest.warns(UserWarning, match=f"computes in {dtype}.*float32") as said:
        got = log_prob(low, x, **options)
    assert len(said) == 1
    exact = ScoreNet(copy.deepcopy(net).double(), VPSDE(), "edm", sigma_data=0.7)
    error = got.value - log_prob(exact, x.double(), **options).value
    assert float(got.trajectory_error.min()) >= 2 * torch.finfo(dtype).eps
    assert 1e-5 < float(error.square().mean().sqrt()) < float(got.trajectory_error.mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_prob(low, x, rtol=1e-2, atol=1e-2)  # no more than the tolerance
        log_prob(ScoreNet(copy.deepcopy(net).float(), VPSDE(), "edm"), x, rtol=1e-2, atol=1e-2)
