"""Networks that write into what they are given or reuse their output: the results of the pure network, everywhere."""

import pytest
import torch
from torch import nn

from scoresde import (
    METHODS,
    VPSDE,
    ClassifierFreeGuidance,
    NonFiniteError,
    ScoreModel,
    ScoreNet,
    denoising_loss,
    elbo,
    encode,
    log_prob,
    sample,
)
from scoresde.models.network import PARAMETERIZATIONS
from scoresde.models.prepared import call_network


class Pure(nn.Module):
    """A smooth function of x, the label and, where there is one, a class."""

    def forward(self, x, label, cond=None):
        shift = label[:, None] if cond is None else label[:, None] + cond["class"][:, None]
        return 0.6 * x + 0.3 * torch.sin(2 * x + shift)


class WritesInput(Pure):
    def forward(self, x, label, cond=None):
        out = super().forward(x, label, cond)
        x += 1.0
        return out


class ReturnsInput(Pure):
    def forward(self, x, label, cond=None):
        out = super().forward(x, label, cond)
        return x.copy_(out)


class WritesLabel(Pure):
    def forward(self, x, label, cond=None):
        out = super().forward(x, label, cond)
        label.mul_(0.5).add_(3.0)
        if cond is not None:
            cond["class"] += 1.0
        return out


class OneBuffer(Pure):
    """Returns views of one buffer, always at the same place."""

    def forward(self, x, label, cond=None):
        if not hasattr(self, "buffer") or self.buffer.shape != x.shape or self.buffer.dtype != x.dtype:
            self.buffer = torch.empty_like(x)
        out = super().forward(x, label, cond)
        if torch.is_grad_enabled():  # a buffer cannot be part of a graph
            return out
        self.buffer.copy_(out)
        return self.buffer[:]


class HiddenBuffer(OneBuffer):
    """The same written from outside of torch, as other runtimes do: no count of writes shows it."""

    def forward(self, x, label, cond=None):
        out = super(OneBuffer, self).forward(x, label, cond)
        if torch.is_grad_enabled():
            return out
        if not hasattr(self, "array") or self.array.shape != tuple(x.shape):
            self.array = out.numpy().copy()
        self.array[...] = out.numpy()
        return torch.from_numpy(self.array)


class LateWriter(Pure):
    """Behaves until half of the way."""

    def forward(self, x, label, cond=None):
        out = super().forward(x, label, cond)
        if float(label[0]) < 0.5:
            x.zero_()
            label.zero_()
        return out


IMPURE = [WritesInput, ReturnsInput, WritesLabel, OneBuffer, HiddenBuffer, LateWriter]


def draw(net, method, parameterization="noise", **options):
    model = ScoreNet(net, VPSDE(), parameterization)
    steps = None if METHODS[method]().nfe_per_step is None else 6
    return sample(model, (3, 2), method=method, steps=steps, seed=0, **options)


@pytest.mark.parametrize("method", METHODS)
def test_samples_are_those_of_the_pure_network(method):
    """To the bit, without a condition and with one; the caller's condition is left alone."""
    expected = draw(Pure(), method)
    cond = {"class": torch.tensor([0.0, 1.0, 2.0])}
    conditional = draw(Pure(), method, cond=cond)
    for kind in IMPURE:
        assert torch.equal(draw(kind(), method), expected), kind.__name__
        assert torch.equal(draw(kind(), method, cond=cond), conditional), kind.__name__
        assert cond["class"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("method", ["dpm++3m", "heun", "auto"])
def test_every_parameterization(method, parameterization):
    """Some scale the input, some hand the output on as it is."""
    expected = draw(Pure(), method, parameterization)
    for kind in IMPURE:
        assert torch.equal(draw(kind(), method, parameterization), expected), kind.__name__


@pytest.mark.parametrize("kind", IMPURE)
def test_likelihoods_losses_and_latents_are_those_of_the_pure_network(kind):
    """Through gradients too, where the network writes into what its own gradient does not need."""
    x = torch.tensor([[0.3, -0.5], [1.0, 0.2]])
    for calculation in (
        lambda m: log_prob(m, x, seed=0).value,
        lambda m: elbo(m, x, seed=0).value,
        lambda m: encode(m, x),
        lambda m: denoising_loss(m, x, seed=0),
    ):
        expected, got = (calculation(ScoreNet(net, VPSDE())) for net in (Pure(), kind()))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", IMPURE)
def test_one_result_is_not_changed_by_the_next(kind):
    """Predictions that are kept, of each kind, and a sample that ends with the network's own output."""
    x, t = torch.tensor([[0.3, -0.5]]), torch.tensor([0.4])
    for parameterization in PARAMETERIZATIONS:
        model, pure = (ScoreNet(net, VPSDE(), parameterization) for net in (kind(), Pure()))
        with torch.no_grad():
            for name in ("denoise", "noise", "score", "velocity"):
                first = getattr(model, name)(x, t)
                getattr(model, name)(2 * x, t)
                assert torch.equal(first, getattr(pure, name)(x, t)), (parameterization, name)
    model = ScoreNet(kind(), VPSDE(), "denoise")
    first = sample(model, (1, 2), method="ddim", steps=3, seed=0)
    kept = first.clone()
    sample(model, (1, 2), method="ddim", steps=3, seed=1)
    assert torch.equal(first, kept)
    assert x.tolist() == torch.tensor([[0.3, -0.5]]).tolist()
    assert t.tolist() == torch.tensor([0.4]).tolist()


@pytest.mark.parametrize("kind", IMPURE)
def test_models_of_a_user_and_guided_ones(kind):
    """A ScoreModel that asks such a network, alone and guided."""

    class Own(ScoreModel):
        def __init__(self, net):
            super().__init__()
            self.net, self.sde = net, VPSDE()

        def denoise(self, x, t, cond=None):
            label = self.time_of(t, x).to(x.dtype).expand(len(x)).clone()
            return self.net(x, label) if cond is None else self.net(x, label, cond)

    cond = {"class": torch.tensor([0.0, 1.0, 2.0])}
    for method in ("dpm++2m", "ddim", "ode", "heun"):
        options = dict(method=method, steps=None if method == "ode" else 5, seed=0)
        expected, got = (sample(Own(net), (3, 2), **options) for net in (Pure(), kind()))
        assert torch.equal(got, expected)
        guided = [
            sample(ClassifierFreeGuidance(ScoreNet(net, VPSDE()), 2.0), (3, 2), **options, cond=cond)
            for net in (Pure(), kind())
        ]
        assert torch.equal(*guided)


def test_transforms_go_through_the_copies():
    """Forward and reverse mode, second derivatives and vmap of a model and of a prepared one."""
    model, x = ScoreNet(Pure(), VPSDE()), torch.tensor([[0.3, -0.5]], dtype=torch.float64)
    t = torch.tensor([0.4, 0.2], dtype=torch.float64)
    prepared = model.prepare(x, t)
    for ask in (
        lambda v: model.denoise(v, t[0]),
        lambda v: prepared.denoise(v, 0.4),
        lambda v: prepared.output(v, 0.4),
    ):
        for _ in range(3):
            forward = torch.func.jacfwd(ask)(x)
            torch.testing.assert_close(forward, torch.func.jacrev(ask)(x))
            torch.testing.assert_close(forward, torch.autograd.functional.jacobian(ask, x))
        assert torch.autograd.gradgradcheck(ask, x.clone().requires_grad_(True))
    with torch.inference_mode():
        inside = model.prepare(x, t)
        torch.testing.assert_close(inside.denoise(x, 0.2), model.denoise(x, t[1]))


BAD = {
    "complex": lambda x: torch.complex(x, x),
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.to(torch.uint8),
    "bool": lambda x: x > 0,
    "meta": lambda x: x.to("meta"),
}


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, label):
        return self.function(x)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("parameterization", ["noise", "edm"])
def test_what_is_no_number_is_refused_by_dtype(kind, parameterization):
    """By samplers, likelihoods and losses alike."""
    model, x = ScoreNet(Returns(BAD[kind]), VPSDE(), parameterization), torch.ones(2, 2)
    named = "float32 on the meta device" if kind == "meta" else rf"dtype torch\.{kind}"
    for call in (
        lambda: sample(model, (2, 2), method="ddim", steps=2, seed=0),
        lambda: sample(model, (2, 2), method="ode", seed=0),
        lambda: log_prob(model, x),
        lambda: denoising_loss(model, x, seed=0),
        lambda: model.score(x, 0.5),
        lambda: call_network(model.net, x, torch.tensor(0.5), None),
    ):
        with pytest.raises(TypeError, match=named):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_of_another_dtype_is_noticed(dtype, value):
    """A network whose numbers break down in its own precision."""
    model = ScoreNet(Returns(lambda x: torch.full_like(x, value, dtype=dtype)), VPSDE())
    for method in ("ddim", "dpm++2m", "ode", "pc"):
        with pytest.raises(NonFiniteError):
            sample(model, (2, 2), method=method, seed=0)
