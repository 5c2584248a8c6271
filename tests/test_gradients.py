"""Gradients of log densities: the graph that differentiable=True keeps, against differences and closed forms."""

import gc
import weakref

import pytest
import torch
from torch import nn

from scoresde import EDMSDE, VPSDE, Exact, Hadamard, Hutchinson, RectifiedFlow, ScoreNet, log_prob
from scoresde.rng import spawn


class Net(nn.Module):
    """A small smooth network with dropout, which must be off."""

    def __init__(self, event=(2,)):
        super().__init__()
        d = torch.Size(event).numel()
        g = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = nn.Linear(d + 1, 12), nn.Linear(12, 12), nn.Linear(12, d)
        self.drop = nn.Dropout(0.5)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=g)
        self.double()

    def forward(self, x, label):
        hidden = torch.tanh(self.first(torch.cat([x.flatten(1), label.to(x)[:, None]], 1)))
        return self.third(self.drop(torch.tanh(self.second(hidden)))).reshape(x.shape)


DIVERGENCES = {"exact": Exact(), "hadamard": Hadamard(2, 1), "hutchinson": Hutchinson(2)}


def differences(value, x, h=1e-5):
    """d value.sum() / dx by central differences, where value(x) is (B,) and rows do not mix."""
    slope = torch.zeros_like(x).flatten(1)
    for i in range(slope.shape[1]):
        step = torch.zeros_like(slope)
        step[:, i] = h
        step = step.reshape(x.shape)
        slope[:, i] = (value(x + step) - value(x - step)) / (2 * h)
    return slope.reshape(x.shape)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_with_respect_to_x(name, full3):
    """That of the value itself, by central differences with the same probes."""
    model, x = full3.diffuse(VPSDE()), full3.sample(4, seed=1)
    options = dict(divergence=DIVERGENCES[name], seed=spawn(0, 4))
    leaf = x.clone().requires_grad_()
    got = log_prob(model, leaf, differentiable=True, **options)
    plain = log_prob(model, x, **options)
    torch.testing.assert_close(got.value.detach(), plain.value, rtol=0, atol=1e-9)
    torch.testing.assert_close(got.latent.detach(), plain.latent, rtol=0, atol=1e-9)
    (slope,) = torch.autograd.grad(got.value.sum(), leaf)
    expected = differences(lambda y: log_prob(model, y, **options).value, x)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-6)


def test_gradient_is_the_score(sde, full3):
    """With exact traces of an exact model it is the gradient of the closed form at t_min."""
    model, x = full3.diffuse(sde), full3.sample(4, seed=1).requires_grad_()
    value = log_prob(model, x, differentiable=True).value
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(slope, model.score(x.detach(), sde.t_min), rtol=0, atol=1e-3)


def test_gradient_is_the_score_where_rows_are_refined(ring8):
    """Rows that ended on different grids come back in their order, values and gradients."""
    sde = VPSDE()
    model, x = ring8.diffuse(sde), ring8.sample(24, seed=5).requires_grad_()
    got = log_prob(model, x, differentiable=True)
    assert len(got.nfe.unique()) > 1
    (slope,) = torch.autograd.grad(got.value.sum(), x)
    expected = model.score(x.detach(), sde.t_min)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=2e-2)
    torch.testing.assert_close(got.value.detach(), model.log_prob(x.detach(), sde.t_min), rtol=0, atol=1e-3)


@pytest.mark.parametrize("process", [VPSDE(), EDMSDE(), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["exact", "hadamard"])
@pytest.mark.parametrize("parameterization", ["edm", "noise"])
def test_gradient_with_respect_to_parameters(process, name, parameterization, ring8):
    """Along a random direction of all parameters: the central difference of the value, to 1e-5."""
    model, x = ScoreNet(Net(), process, parameterization, sigma_data=0.7), ring8.sample(2, seed=1)
    options = dict(divergence=DIVERGENCES[name], seed=[3, 4], rtol=1e-3, atol=1e-3)
    parameters = list(model.parameters())
    value = log_prob(model, x, differentiable=True, **options).value.sum()
    slopes = torch.autograd.grad(value, parameters)
    g = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, v in zip(parameters, directions, strict=True):
                p.add_(v, alpha=step)
        values.append(float(log_prob(model, x, **options).value.sum()))
    expected = (values[0] - values[1]) / 2e-5
    got = sum(float((s * v).sum()) for s, v in zip(slopes, directions, strict=True))
    assert got == pytest.approx(expected, rel=1e-5)


def test_gradients_on_images(image16):
    """An image-shaped event, through the whole graph, with float32 data and a float64 value."""
    model = ScoreNet(Net((1, 4, 4)).float(), VPSDE(), "edm", sigma_data=0.4)
    x = image16.sample(2, seed=0).float().requires_grad_()
    got = log_prob(model, x, divergence=Hadamard(4, 2), seed=0, differentiable=True, rtol=1e-3, atol=1e-3)
    assert got.value.dtype == torch.float64
    got.value.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.isfinite(x.grad).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert any(bool((p.grad != 0).any()) for p in model.parameters())


def test_the_latent_carries_the_graph_too(full3):
    """Its gradient is the Jacobian of the encoding, by differences."""
    model, x = full3.diffuse(VPSDE()), full3.sample(2, seed=1)
    leaf = x.clone().requires_grad_()
    weights = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
    (slope,) = torch.autograd.grad((log_prob(model, leaf, differentiable=True).latent @ weights).sum(), leaf)
    expected = differences(lambda y: log_prob(model, y).latent @ weights, x)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("differentiable", [False, True])
def test_modes_are_restored(differentiable, ring8):
    """Dropout is off in both passes, so values repeat; every module is in training mode again afterwards."""
    model, x = ScoreNet(Net(), VPSDE(), "noise").train(), ring8.sample(2, seed=1)
    model.net.second.eval()
    options = dict(rtol=1e-2, atol=1e-2, differentiable=differentiable)
    first, second = (log_prob(model, x, **options).value for _ in range(2))
    assert torch.equal(first, second)
    assert [m.training for m in model.modules()] == [m is not model.net.second for m in model.modules()]
    assert torch.is_grad_enabled()


def test_nothing_requires_a_gradient_without_being_asked(ring8):
    """Neither x nor parameters that require gradients leave a graph behind, and no gradient is gathered."""
    model, x = ScoreNet(Net(), VPSDE(), "noise"), ring8.sample(2, seed=1).requires_grad_()
    for divergence in DIVERGENCES.values():
        got = log_prob(model, x, divergence=divergence, seed=0, rtol=1e-2, atol=1e-2)
        for name in ("value", "stderr", "latent", "trajectory_error", "quadrature_error"):
            assert not getattr(got, name).requires_grad, name
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    got = log_prob(model, x, differentiable=True, rtol=1e-2, atol=1e-2)
    for name in ("stderr", "trajectory_error", "quadrature_error"):
        assert not getattr(got, name).requires_grad, name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("differentiable", [False, True])
def test_no_graph_is_kept(differentiable, ring8):
    """Without `differentiable` no intermediate output outlives the call, and none but the last two are alive at a time; with
    it they are alive until the result is given up."""
    alive, most = [], [0]

    class Recorded(Net):
        def forward(self, x, label):
            out = super().forward(x, label)
            token = nn.Parameter(torch.zeros((), dtype=x.dtype)) if torch.is_grad_enabled() else None
            if token is not None:  # a leaf that only this evaluation's graph keeps
                out = out + token
                alive.append(weakref.ref(token))
                most[0] = max(most[0], sum(r() is not None for r in alive))
            return out

    model, x = ScoreNet(Recorded(), VPSDE(), "noise"), ring8.sample(2, seed=1)
    got = log_prob(model, x, differentiable=differentiable, rtol=1e-2, atol=1e-2)
    gc.collect()
    kept = sum(r() is not None for r in alive)
    assert len(alive) > 10
    if differentiable:
        assert kept > 10
        del got
        gc.collect()
        assert sum(r() is not None for r in alive) == 0
    else:
        assert kept == 0
        assert most[0] <= 2
