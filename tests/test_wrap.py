"""Discrete schedules in continuous time, and live networks of any kind as models, against exact answers."""

import dataclasses
import json
import math
import types

import mpmath
import numpy as np
import pytest
import torch
from test_score_sde import worst
from torch import nn

from scoresde import (
    VPSDE,
    DiscreteVPSDE,
    GaussianMixture,
    NoiseLabel,
    RectifiedFlow,
    ScoreNet,
    WrappedNet,
    bits_per_dim,
    log_prob,
    sample,
    store,
)
from scoresde.nets import MLP
from scoresde.sde import expand

SCHEDULES = {
    "ddpm": np.linspace(1e-4, 0.02, 1000),
    "scaled": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    "capped": 1 - (f := np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2)[1:] / f[:-1],
    "rough": np.random.default_rng(3).uniform(1e-4, 0.5, 30),
    "three": np.array([0.1, 0.5, 0.2]),
    "two": np.array([1e-4, 0.9]),
}
SCHEDULES["capped"] = np.minimum(SCHEDULES["capped"], 0.999)
BETAS = SCHEDULES["ddpm"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_are_exact(name):
    """At t = i / (N - 1), alpha^2 and sigma^2 are the product of 1 - beta and what it lacks to 1, in 50 digits."""
    sde = DiscreteVPSDE(tuple(SCHEDULES[name]))
    n, worst_error = sde.steps, 0.0
    t = torch.arange(n, dtype=torch.float64) / (n - 1)
    alpha, sigma, snr = sde.alpha(t), sde.sigma(t), sde.log_snr(t)
    with mpmath.workdps(50):
        bar = mpmath.mpf(1)
        for i, beta in enumerate(sde.betas):
            bar *= 1 - mpmath.mpf(beta)
            exact = (mpmath.sqrt(bar), mpmath.sqrt(1 - bar), mpmath.log(bar / (1 - bar)))
            for got, expected in zip((alpha[i], sigma[i], snr[i]), exact, strict=True):
                scale = max(abs(expected), mpmath.mpf("0.01"))
                worst_error = max(worst_error, float(abs(mpmath.mpf(float(got)) - expected) / scale))
    assert worst_error < 1e-11
    assert float(sde.sigma(0.0)) == pytest.approx(math.sqrt(sde.betas[0]), rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_between_the_steps(name):
    """The log-SNR falls strictly, `time` inverts it, and rates are the derivatives that autograd finds."""
    sde = DiscreteVPSDE(tuple(SCHEDULES[name]))
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    snr = sde.log_snr(t)
    assert bool((snr.diff() < 0).all())
    # of the three steps the last is so small that the slope ends at 0, and the inverse in half the digits
    torch.testing.assert_close(sde.time(snr), t, rtol=0, atol=1e-7 if name == "three" else 1e-9)
    inner = torch.linspace(0.0013, 0.9987, 503, dtype=torch.float64).requires_grad_()
    for value, rate in ((sde.alpha, sde.alpha_dot), (sde.sigma, sde.sigma_dot)):
        (slope,) = torch.autograd.grad(value(inner).sum(), inner)
        torch.testing.assert_close(rate(inner.detach()), slope, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        alpha, sigma = sde.alpha(inner), sde.sigma(inner)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)
        torch.testing.assert_close(sde.drift_scale(inner) * alpha, sde.alpha_dot(inner), rtol=1e-12, atol=0)
        growth = (
            2 * sigma * sde.sigma_dot(inner) - 2 * sde.drift_scale(inner) * sigma**2
        )  # d sigma^2/dt = 2 f sigma^2 + g^2
        torch.testing.assert_close(sde.diffusion(inner) ** 2, growth, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sde.half_variance_rate(inner), sigma * sde.sigma_dot(inner), rtol=1e-9, atol=1e-10)


def test_no_jumps():
    """alpha and the rate beta are continuous through the steps, unlike the staircase of the betas themselves."""
    sde = DiscreteVPSDE(tuple(BETAS))
    knots = torch.arange(1, 999, dtype=torch.float64) / 999
    for f in (sde.alpha, lambda t: sde.diffusion(t) ** 2):
        torch.testing.assert_close(f(knots - 1e-12), f(knots + 1e-12), rtol=1e-7, atol=1e-9)


def test_linear_is_nearly_the_vp_process():
    """A thousand steps of Song et al.'s betas lie within a percent of their continuous VP process."""
    sde = DiscreteVPSDE.linear(0.1 / 1000, 20.0 / 1000, 1000)
    assert sde.betas == DiscreteVPSDE.linear().betas
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(sde.log_snr(t), VPSDE().log_snr(t - 0.0), rtol=0.02, atol=0.12)


def test_dtypes_and_numbers():
    """float32 times give float32, plain numbers work, and steps are exact in float32 too."""
    sde = DiscreteVPSDE(tuple(BETAS))
    t = torch.tensor([0.0, 0.4, 1.0])
    for f in (sde.alpha, sde.sigma, sde.log_snr, sde.diffusion, sde.drift_scale):
        assert f(t).dtype == torch.float32
        torch.testing.assert_close(f(t).double(), f(t.double()), rtol=2e-6, atol=1e-7)
        assert float(f(0.4)) == pytest.approx(float(f(t.double())[1]), rel=1e-5)


def test_a_discrete_process_in_a_file(tmp_path):
    """Its betas come back to the bit, also through JSON."""
    sde = DiscreteVPSDE(tuple(SCHEDULES["rough"]), t_min=1e-3)
    model = ScoreNet(MLP(2, width=4, depth=1), sde, label=NoiseLabel("time", 29.0))
    loaded = store.load_model(store.save_model(model, tmp_path))
    assert loaded.sde == sde
    assert loaded.label == model.label
    again = DiscreteVPSDE(**json.loads(json.dumps(dataclasses.asdict(sde))))
    assert again == sde
    assert hash(again) == hash(sde)


@pytest.mark.parametrize("betas", [(), (0.1,), (0.1, 0.0), (0.1, 1.0), (-0.1, 0.2), (0.1, float("nan"))])
def test_betas_that_are_refused(betas):
    """Fewer than two, or one outside (0, 1)."""
    with pytest.raises(ValueError, match=r"betas must be at least two numbers in \(0, 1\)"):
        DiscreteVPSDE(betas)


# -- wrapped networks ------------------------------------------------------------------------------------------------

MIXTURE = GaussianMixture([0.4, 0.6], [[0.6, -0.3], [-0.4, 0.2]], [np.eye(2) * 0.05, [[0.1, 0.06], [0.06, 0.08]]])
DISCRETE = DiscreteVPSDE(tuple(BETAS))
EXACT = MIXTURE.diffuse(DISCRETE)


class Exact(nn.Module):
    """A network that knows the mixture: it turns its label, a step of the schedule, back into a time."""

    def __init__(self, predicts, sde=DISCRETE, steps=999.0, answer=lambda out: out):
        super().__init__()
        self.predicts, self.model, self.steps, self.answer, self.seen = (
            predicts,
            MIXTURE.diffuse(sde),
            steps,
            answer,
            [],
        )

    def forward(self, x, label, *cond, **named):
        self.seen.append((label, cond, named))
        t = label.double() / self.steps
        if self.predicts == "v_prediction":
            denoised, noise = self.model.predict(x, t)
            alpha, sigma = (expand(f(t), x) for f in (self.model.sde.alpha, self.model.sde.sigma))
            return self.answer(alpha * noise - sigma * denoised)
        if self.predicts == "scaled_score":
            return self.answer(-self.model.noise(x, t))
        return self.answer(getattr(self.model, self.predicts)(x, t))


@pytest.mark.parametrize("predicts", ["noise", "denoise", "velocity", "v_prediction", "score", "scaled_score"])
def test_what_a_network_predicts(predicts):
    """Every kind of prediction of the exact mixture gives its denoiser, and its density to 1e-3 nats."""
    model = WrappedNet(Exact(predicts), betas=BETAS, predicts=predicts, event_shape=(2,))
    x = MIXTURE.sample(16, seed=1)
    for t in (0.003, 0.0625, 0.5, 0.95):
        z = EXACT.sde.alpha(t) * x + EXACT.sde.sigma(t) * torch.randn(
            x.shape, generator=torch.Generator().manual_seed(2)
        )
        for name in ("denoise", "noise", "score", "velocity"):
            got, expected = (getattr(m, name)(z, t) for m in (model, EXACT))
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    found = log_prob(model, x, rtol=1e-6, atol=1e-6)
    assert float((found.value - EXACT.log_prob(x)).abs().max()) < 1e-3


def test_a_wrapped_network_in_use():
    """It samples the mixture, and integer data have their bits/dim."""
    model = WrappedNet(Exact("noise"), betas=BETAS, event_shape=(2,), levels=64, value_range=(-2.0, 2.0))
    x = sample(model, (400, 2), method="auto", nfe=20, seed=0)
    assert float((x.double().mean(0) - MIXTURE.mean).abs().max()) < 0.1
    torch.testing.assert_close(torch.cov(x.double().T), MIXTURE.covariance, rtol=0, atol=0.06)
    k = ((MIXTURE.sample(8, seed=4) + 2) * 16).long().clamp(0, 63)
    bits = bits_per_dim(model, k, seed=0, rtol=1e-4)
    exact = bits_per_dim(EXACT, k, levels=64, value_range=(-2.0, 2.0), seed=0, rtol=1e-4)
    assert bits.mean == pytest.approx(exact.mean, abs=1e-3)


def test_labels():
    """The step (N - 1) t where betas are given, else t; `round_labels` makes int64 steps of them."""
    x, t = torch.zeros(3, 2), torch.tensor([0.0, 0.4003, 1.0], dtype=torch.float64)
    for options, expected in (
        (dict(betas=BETAS), 999 * t),
        (dict(betas=BETAS, round_labels=True), torch.tensor([0, 400, 999])),
        (dict(betas=BETAS, label=NoiseLabel("log_sigma", 2.0)), -DISCRETE.log_snr(t)),
        (dict(sde=VPSDE()), t),
        (dict(sde=VPSDE(), label=NoiseLabel("time", 999.0)), 999 * t),
    ):
        seen = []
        WrappedNet(lambda x, label, seen=seen: seen.append(label) or x, **options).noise(x, t)
        (label,) = seen
        assert label.dtype == (torch.int64 if expected.dtype == torch.int64 else torch.float32)
        torch.testing.assert_close(label, expected.to(label.dtype))


@pytest.mark.parametrize(
    "answer",
    [lambda out: (out, 3), lambda out: types.SimpleNamespace(sample=out), lambda out: torch.cat([out, out + 9], 1)],
    ids=["tuple", "sample", "variance"],
)
def test_what_a_network_may_return(answer, request):
    """A tuple, an object with `.sample`, or twice the channels with a variance: the prediction is taken out."""
    variance = "variance" in request.node.name
    model = WrappedNet(Exact("noise", answer=answer), betas=BETAS, learned_variance=variance)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.noise(x, 0.4), EXACT.noise(x, 0.4), rtol=1e-4, atol=1e-5)
    if variance:
        with pytest.raises(ValueError, match="learned_variance=True expects 4 channels"):
            WrappedNet(Exact("noise"), betas=BETAS, learned_variance=True).noise(x, 0.4)


def test_conditions():
    """Given after the label, or by the name that the network has for it; without one the network is called without."""
    x, cond = torch.zeros(2, 2), torch.tensor([1, 0])
    for name, expected in ((None, ((cond,), {})), ("y", ((), {"y": cond}))):
        net = Exact("noise")
        model = WrappedNet(net, betas=BETAS, cond_name=name)
        model.noise(x, 0.5, cond)
        model.noise(x, 0.5)
        assert [len(part) for part in net.seen[0][1:]] == [len(part) for part in expected]
        given = net.seen[0][1][0] if name is None else net.seen[0][2]["y"]
        assert torch.equal(given, cond)
        assert net.seen[1][1:] == ((), {})


def test_arguments_that_are_refused():
    """Neither or both of sde and betas; a prediction that is not known, or that has a constructor of its own."""
    for options in ({}, dict(sde=VPSDE(), betas=BETAS)):
        with pytest.raises(ValueError, match=r"give either sde=.* or betas="):
            WrappedNet(Exact("noise"), **options)
    for predicts in ("edm", "eps"):
        with pytest.raises(ValueError, match="kind of prediction"):
            WrappedNet(Exact("noise"), RectifiedFlow(), predicts)


class Denoiser(nn.Module):
    """D(x, sigma) of the mixture, as EDM's networks are called."""

    sigma_min, sigma_max, img_resolution, img_channels = 0.0, float("inf"), 1, 2

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        self.calls.append(class_labels)
        sde = WrappedNet.edm(nn.Identity()).sde
        return MIXTURE.diffuse(sde).denoise(x.flatten(1), sigma_time(sde, sigma)).reshape(x.shape)


def sigma_time(sde, sigma):
    return sde.time(-2 * sigma.double().log())


def test_edm_denoisers():
    """A callable D(x, sigma) keeps its shape, its range of noise levels and its answers; classes go by their name."""
    net = Denoiser()
    model = WrappedNet.edm(net)
    assert model.event_shape == (2, 1, 1)
    assert (model.sde.sigma_min, model.sde.sigma_max, model.sigma_data) == (0.002, 80.0, 0.5)
    exact = MIXTURE.diffuse(model.sde)
    for sigma in (0.01, 0.5, 20.0):
        t = sigma_time(model.sde, torch.tensor(sigma))
        x = MIXTURE.sample(8, seed=1) + sigma * torch.randn(8, 2, generator=torch.Generator().manual_seed(2))
        got, expected = (m.denoise(v, t) for m, v in ((model, x[:, :, None, None]), (exact, x)))
        torch.testing.assert_close(got.flatten(1), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            model.score(x[:, :, None, None], t).flatten(1), exact.score(x, t), rtol=1e-3, atol=1e-4
        )
    labels = torch.eye(8)
    model.denoise(x[:, :, None, None], t, labels)
    assert torch.equal(net.calls[-1], labels)
    assert net.calls[0] is None
    found = log_prob(model, MIXTURE.sample(6, seed=3)[:, :, None, None], rtol=1e-6, atol=1e-6)
    assert float((found.value - exact.log_prob(MIXTURE.sample(6, seed=3))).abs().max()) < 1e-3
    net.sigma_min, net.sigma_max = 0.01, 50.0
    narrow = WrappedNet.edm(net, sigma_data=0.7)
    assert (narrow.sde.sigma_min, narrow.sde.sigma_max, narrow.sigma_data) == (0.01, 50.0, 0.7)


@pytest.mark.parametrize("as_options", [False, True], ids=["scheduler", "options"])
def test_live_networks_of_diffusers(as_options, tmp_path):
    """A live network with its scheduler is what `load` makes of the files that both are saved as."""
    pytest.importorskip("diffusers")
    import diffusers
    from test_diffusers import KINDS, save, unet

    from scoresde import load

    net = unet(KINDS["adm"])
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    loaded = load(save(net, tmp_path, scheduler))
    live = WrappedNet.diffusers(net, dict(scheduler.config) if as_options else scheduler)
    assert live.sde == loaded.sde
    x, cond = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 4])
    with torch.no_grad():
        for t in (0.1, 0.5005, 0.9):
            assert worst(live.noise(x, t, cond), loaded.noise(x, t, cond)) < 1e-5
            assert worst(live.denoise(x, t, cond), loaded.denoise(x, t, cond)) < 1e-5
