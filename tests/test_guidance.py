"""Classifier-free guidance on mixtures whose conditional and unconditional denoisers are closed form."""

import math

import pytest
import torch

from scoresde import VESDE, VPSDE, ClassifierFreeGuidance, GaussianMixture, ScoreModel, log_prob, sample
from scoresde.sde import expand

MEANS = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)


class Labelled(ScoreModel):
    """p(x | class k) is component k of a mixture, p(x) the mixture; float64, both exact."""

    def __init__(self, sde):
        super().__init__()
        self.sde = sde
        self.whole = GaussianMixture.isotropic(MEANS, 0.5).diffuse(sde)
        self.parts = [GaussianMixture.isotropic(m[None], 0.5).diffuse(sde) for m in MEANS]
        self.calls = 0

    def terminal_log_prob(self, x):
        return self.parts[0].terminal_log_prob(x)

    def denoise(self, x, t, cond=None):
        self.calls += 1
        if cond is None:
            return self.whole.denoise(x, t)
        each = torch.stack([p.denoise(x, t) for p in self.parts], 1)
        return each[torch.arange(len(x)), cond]


@pytest.fixture(params=[VPSDE(), VESDE()], ids=lambda s: type(s).__name__)
def model(request):
    return Labelled(request.param)


def batch(model, n=6):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=g, dtype=torch.float64)
    t = torch.linspace(0.1, 0.8, n, dtype=torch.float64)
    return x * expand(model.sde.sigma(t), x), t, torch.arange(n) % 3


def test_guided_score_is_the_score_moved_by_the_class_gradient(model):
    """score_w = score + w grad log p_t(class | x), with the gradient from the mixture's own densities by autograd."""
    x, t, cond = batch(model)
    leaf = x.clone().requires_grad_(True)
    joint = torch.stack([p.log_prob(leaf, t) for p in model.parts], 1)
    log_class = torch.log_softmax(joint, 1)[torch.arange(len(x)), cond]
    (gradient,) = torch.autograd.grad(log_class.sum(), leaf)
    for w in (0.0, 0.5, 1.0, 3.0, -1.0):
        guided = ClassifierFreeGuidance(model, w)
        expected = model.whole.score(x, t) + w * gradient
        torch.testing.assert_close(guided.score(x, t, cond), expected, rtol=1e-9, atol=1e-9)


def test_interval_of_noise_levels(model):
    """Guided within the interval and at its ends, the conditional model outside, in one batch of times."""
    x, t, cond = batch(model)
    level = torch.exp(-0.5 * model.sde.log_snr(t))
    low, high = float(level[1]) * (1 - 1e-12), float(level[3]) * (1 + 1e-12)
    guided = ClassifierFreeGuidance(model, 2.5, interval=(low, high))
    everywhere = ClassifierFreeGuidance(model, 2.5)
    inside = torch.tensor([False, True, True, True, False, False])
    expected = torch.where(inside[:, None], everywhere.denoise(x, t, cond), model.denoise(x, t, cond))
    torch.testing.assert_close(guided.denoise(x, t, cond), expected, rtol=1e-12, atol=1e-12)


def test_evaluations(model):
    """Two network evaluations, one where the weight leaves only one, one without a condition."""
    x, t, cond = batch(model)
    for w, given, calls in ((2.0, cond, 2), (1.0, cond, 1), (0.0, cond, 1), (2.0, None, 1)):
        model.calls = 0
        ClassifierFreeGuidance(model, w).denoise(x, t, given)
        assert model.calls == calls


def test_samples_move_into_the_class(model):
    """Plain conditional samples have the class' mean and spread; a larger weight puts less on the other classes' side."""
    cond = torch.zeros(2000, dtype=torch.long)
    draw = lambda w: sample(  # noqa: E731
        ClassifierFreeGuidance(model, w), (2000, 2), method="dpm++2m", steps=40, seed=0, cond=cond
    ).double()
    plain, strong = draw(1.0), draw(3.0)
    torch.testing.assert_close(plain.mean(0), MEANS[0], rtol=0, atol=0.06)
    torch.testing.assert_close(plain.std(0), torch.full((2,), 0.5, dtype=torch.float64), rtol=0.1, atol=0)
    assert float((strong[:, 0] > -1).double().mean()) < 0.5 * float((plain[:, 0] > -1).double().mean())


def test_log_prob_of_a_guided_model(model):
    """With w = 1 the log density is the class' own, to 1e-3 nats; with another weight it is finite."""
    x = GaussianMixture.isotropic(MEANS[:1], 0.5).sample(8, seed=1)
    cond = torch.zeros(8, dtype=torch.long)
    exact = model.parts[0].log_prob(x, model.sde.t_min)
    got = log_prob(ClassifierFreeGuidance(model, 1.0), x, cond=cond, rtol=1e-6, atol=1e-6).value
    torch.testing.assert_close(got, exact, rtol=0, atol=2e-3)
    assert bool(torch.isfinite(log_prob(ClassifierFreeGuidance(model, 2.0), x, cond=cond).value).all())


def test_errors():
    """Not a model, a scale that is no number, an empty interval."""
    model = Labelled(VPSDE())
    with pytest.raises(TypeError, match="ScoreModel"):
        ClassifierFreeGuidance(torch.nn.Identity(), 2.0)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            ClassifierFreeGuidance(model, bad)
    for bad in ((1.0, 1.0), (2.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="interval"):
            ClassifierFreeGuidance(model, 2.0, interval=bad)
