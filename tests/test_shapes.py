"""What docstrings say of shapes, checked on every call: vectors, 1D, 2D and 3D examples, and batches of 0, 1 and 3.

`shaped(function, "(B, *), (B,) -> (B, *)")` is the function with its tensors checked: B and the event * must mean the same in
all of them, which also refuses what broadcasting would let through.
"""

import re

import pytest
import torch

from scoresde import (
    METHODS,
    VPSDE,
    ClassifierFreeGuidance,
    GaussianMixture,
    Hutchinson,
    ScoreNet,
    bits_per_dim,
    ddpm_bound,
    decode,
    denoising_loss,
    elbo,
    encode,
    interpolate,
    log_prob,
    round_trip,
    sample,
    slerp,
)
from scoresde.grids import angle, balanced, cosine, karras, uniform_log_snr, uniform_time
from scoresde.losses import TIME_SAMPLING, WEIGHTINGS, draw_times, explicit_loss, sliced_loss, weight
from scoresde.metrics import sliced_wasserstein
from scoresde.nets import MLP, DiT, LeanUNet, UNet
from scoresde.rng import RandomSource

EVENTS = {"vector": (3,), "1D": (1, 4), "2D": (1, 2, 4), "3D": (1, 2, 2, 2)}
BATCHES = (0, 1, 3)


def parse(spec):
    """ "(B, *), () -> (B,)" -> the patterns of the arguments and those of the results."""
    return [[re.findall(r"[\w*]+", p) for p in re.findall(r"\(([^)]*)\)", side)] for side in spec.split("->")]


def bind(pattern, shape, bound, what):
    """Compare a shape with its pattern, and remember what B and * stood for."""
    named = [name for name in pattern if name != "*"]
    at = pattern.index("*") if "*" in pattern else len(named)  # * takes what the others leave
    extra = len(shape) - len(named)
    assert extra == 0 or (extra > 0 and "*" in pattern), f"{what} has shape {tuple(shape)}, not {pattern}"
    found = list(zip(named, (*shape[:at], *shape[at + extra :]), strict=True))
    for name, value in [*found, ("*", tuple(shape[at : at + extra]))] if "*" in pattern else found:
        known = int(name) if name.isdigit() else bound.setdefault(name, value)
        assert known == value, f"{what} has shape {tuple(shape)}: {name} is {value} there, and was {known}"


def shaped(function, spec):
    """The function, its tensor arguments and results held to `spec`."""
    arguments, results = parse(spec)

    def checked(*args, **kwargs):
        bound = {}
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert len(tensors) == len(arguments), "the pattern has another number of tensors"
        for i, (pattern, tensor) in enumerate(zip(arguments, tensors, strict=True)):
            bind(pattern, tensor.shape, bound, f"argument {i}")
        out = function(*args, **kwargs)
        outs = out if isinstance(out, tuple) else (out,)
        for i, (pattern, tensor) in enumerate(zip(results, outs, strict=True)):
            bind(pattern, tensor.shape, bound, f"result {i}")
        return out

    return checked


def fields(function, names):
    """The function, with these fields of its result in place of the result."""
    return lambda *args, **kwargs: tuple(getattr(function(*args, **kwargs), name) for name in names.split())


@pytest.mark.parametrize(
    ("result", "says"),
    [((4, 2), "B is 4"), ((1, 2), "B is 1"), ((3, 1), r"\* is \(1,\)"), ((3,), r"\* is \(\)"), ((), "not")],
)
def test_the_check_sees_what_broadcasting_hides(result, says):
    wrong = shaped(lambda x: torch.zeros(result), "(B, *) -> (B, *)")
    with pytest.raises(AssertionError, match=says):
        wrong(torch.zeros(3, 2))
    right = shaped(lambda x: (x, x.sum(1)), "(B, *) -> (B, *), (B,)")
    assert right(torch.zeros(3, 2))[1].shape == (3,)


@pytest.fixture(params=EVENTS.values(), ids=EVENTS)
def event(request):
    return request.param


@pytest.fixture(params=BATCHES)
def batch(request):
    return request.param


def mixture(event, sde=None):
    """Two Gaussians of this event's shape under a process."""
    size = torch.Size(event).numel()
    means = torch.linspace(-0.5, 0.5, size, dtype=torch.float64) * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    return GaussianMixture.isotropic(means, 0.3, event_shape=event).diffuse(sde or VPSDE())


def draw(batch, event, seed=0):
    return torch.randn(batch, *event, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_processes(sde, event, batch):
    x, t = draw(batch, event), torch.linspace(0.2, 0.9, batch, dtype=torch.float64)
    for name in (
        "alpha",
        "sigma",
        "alpha_dot",
        "sigma_dot",
        "half_variance_rate",
        "drift_scale",
        "diffusion",
        "log_snr",
    ):
        function = getattr(sde, name)
        shaped(function, "(B,) -> (B,)")(t)
        shaped(function, "() -> ()")(torch.tensor(0.5, dtype=torch.float64))
        shaped(function, "(B, 1, 2) -> (B, 1, 2)")(t[:, None, None].expand(-1, 1, 2))
        assert function(0.5).shape == ()
    shaped(sde.time, "(B,) -> (B,)")(sde.log_snr(t))
    for at, spec in ((t, "(B,)"), (torch.tensor(0.5), "()")):
        shaped(sde.drift, f"(B, *), {spec} -> (B, *)")(x, at)
        shaped(sde.perturb, f"(B, *), {spec}, (B, *) -> (B, *)")(x, at, x)
    shaped(sde.prior_log_prob, "(B, *) -> (B,)")(x)
    assert sde.prior_sample(x.shape, seed=0).shape == x.shape


def test_models(event, batch):
    x, t = draw(batch, event), torch.linspace(0.2, 0.9, batch, dtype=torch.float64)
    exact = mixture(event)
    size = torch.Size(event).numel()
    flat = ScoreNet(MLP(size, width=16, depth=1).double(), VPSDE(), "edm") if len(event) == 1 else None
    for model in filter(None, (exact, flat, ClassifierFreeGuidance(exact, 2.0))):
        for at, spec in ((t, "(B,)"), (torch.tensor(0.5, dtype=torch.float64), "()")):
            for name in ("denoise", "score", "noise", "velocity"):
                shaped(getattr(model, name), f"(B, *), {spec} -> (B, *)")(x, at)
            shaped(model.predict, f"(B, *), {spec} -> (B, *), (B, *)")(x, at)
        shaped(model.terminal_log_prob, "(B, *) -> (B,)")(x)
    shaped(exact.log_prob, "(B, *), (B,) -> (B,)")(x, t)
    shaped(exact.mixture.log_prob, "(B, *) -> (B,)")(x)
    assert exact.mixture.sample(batch, seed=0).shape == x.shape


def test_losses(sde, event, batch):
    x, model = draw(batch, event), mixture(event, sde)
    t = torch.full((batch,), 0.5, dtype=torch.float64)
    for weighting in WEIGHTINGS:
        shaped(weight, "(B,) -> (B,)")(sde, t, weighting)
        if batch:  # nothing can be learned from no example, so that an empty batch is refused
            shaped(denoising_loss, "(B, *) -> (B,)")(model, x, weighting=weighting, seed=0)
    for sampling in TIME_SAMPLING:
        assert [v.shape for v in draw_times(sde, batch, sampling, RandomSource(0, "cpu", batch))] == [t.shape] * 2
    shaped(explicit_loss, "(B, *), (B,), (B, *) -> (B,)")(model, x, t, x)
    shaped(sliced_loss, "(B, *), (B,) -> (B,)")(model, x, t, seed=0)


def test_grids(sde):
    for grid in (uniform_time, uniform_log_snr, karras, angle, balanced, cosine):
        for steps in (1, 5):
            assert grid(sde, steps).shape == (steps + 1,)


def test_likelihoods(event, batch):
    x, model = mixture(event).mixture.sample(batch, seed=0), mixture(event)
    each = "value latent nfe status"
    for method in ("decoupled", "tsit5"):
        shaped(fields(log_prob, each), "(B, *) -> (B,), (B, *), (B,), (B,)")(
            model, x, method=method, rtol=1e-2, atol=1e-2
        )
    shaped(fields(log_prob, "value stderr"), "(B, *) -> (B,), (B,)")(model, x, divergence=Hutchinson(2), seed=0)
    shaped(fields(elbo, f"{each} stderr"), "(B, *) -> (B,), (B, *), (B,), (B,), (B,)")(model, x, draws=4, seed=0)
    terms = "prior diffusion reconstruction value steps times"
    shaped(fields(ddpm_bound, terms), "(B, *) -> (B,), (B,), (B,), (B,), (5, B), (6,)")(model, x, steps=5, seed=0)
    if batch:
        levels = torch.randint(0, 4, x.shape, generator=torch.Generator().manual_seed(0))
        found = shaped(fields(bits_per_dim, "per_example"), "(B, *) -> (B,)")
        found(model, levels, levels=4, value_range=(-1.0, 1.0), seed=0)


def test_latents(event, batch):
    model = mixture(event)
    x = model.mixture.sample(batch, seed=0)
    loose = dict(rtol=1e-2, atol=1e-2)
    z = shaped(encode, "(B, *) -> (B, *)")(model, x, **loose)
    shaped(decode, "(B, *) -> (B, *)")(model, z, **loose)
    shaped(round_trip, "(B, *) -> (B, *), (B,)")(model, x, **loose)
    shaped(slerp, "(B, *), (B, *) -> (B, *)")(z, draw(batch, event, 1), 0.3)
    shaped(interpolate, "(B, *), (B, *) -> (5, B, *)")(model, x, x.flip(0) + 0.1, 5, **loose)


@pytest.mark.parametrize("method", METHODS)
def test_samplers(method):
    if method in ("torchdiffeq", "sde"):
        pytest.importorskip({"sde": "torchsde"}.get(method, method))
    steps = {} if METHODS[method]().nfe_per_step is None else {"steps": 4}
    for event in EVENTS.values():
        model = mixture(event)

        def drawn(x, model=model):
            return sample(model, x.shape, method=method, x_init=x, seed=0, **steps)

        for batch in BATCHES:
            shaped(drawn, "(B, *) -> (B, *)")(model.sde.prior_std * draw(batch, event))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_networks(axes, batch):
    size = (8,) * axes
    x, label = draw(batch, (2, *size)).float(), torch.linspace(-1, 1, batch)
    unet = UNet(2, 2, size, width=8, multipliers=(1, 2), blocks=1, attention=())
    nets = [unet, DiT(2, 2, size, patch=4, width=12 * axes, depth=1, heads=2)]
    nets += [LeanUNet(2, 2, size, channels=(8, 16), blocks=(1, 1))] if axes == 2 else []
    for net in nets:
        shaped(net, "(B, *), (B,) -> (B, *)")(x, label)
    shaped(MLP(5, width=8, depth=1), "(B, *), (B,) -> (B, *)")(draw(batch, (5,)).float(), label)


def test_a_distance_is_a_number(event):
    assert isinstance(sliced_wasserstein(draw(4, event), draw(5, event, 1)), float)
