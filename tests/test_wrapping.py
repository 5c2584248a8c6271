"""Models around models: what a wrapper does not change is the inner model's, now and later; clipped denoisers."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from scoresde import (
    VPSDE,
    ClassifierFreeGuidance,
    Clipped,
    DiscreteVPSDE,
    GaussianMixture,
    RectifiedFlow,
    ScoreModel,
    ScoreNet,
    log_prob,
    sample,
)
from scoresde.metrics import sliced_wasserstein
from scoresde.models.wrapping import WrappedModel
from scoresde.sde import expand


class Same(WrappedModel):
    """Changes nothing."""

    def denoise(self, x, t, cond=None):
        return self.model.denoise(x, t, cond)


def nested(model):
    return Same(ClassifierFreeGuidance(model, 2.0))


@pytest.fixture
def told(full3):
    """A model whose every attribute differs from the defaults."""
    model = full3.diffuse(RectifiedFlow())
    model.levels, model.value_range, model.flow_mismatch = 7, (0.0, 3.0), 0.4
    return model


def test_everything_said_is_the_inner_model_s(told):
    """Attributes, properties and methods, through two wrappers."""
    told.terminal_log_prob = lambda x: told.log_prob(x, 0.9)
    outer = nested(told)
    names = ["sde", "sigma_data", "data_mean", "event_shape", "levels", "value_range"]
    for name in (*names, "flow_scales", "trace_scales", "flow_mismatch", "flow_end"):
        assert getattr(outer, name) is getattr(told, name) or getattr(outer, name) == getattr(told, name), name
    x = torch.zeros(2, 3)
    assert torch.equal(outer.terminal_log_prob(x), told.terminal_log_prob(x))
    assert not torch.equal(outer.terminal_log_prob(x), told.sde.prior_log_prob(x))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        outer.check_event((4,))


def test_an_attribute_that_scoremodel_learns_later(told, monkeypatch):
    """No wrapper is edited: a value, a property and a method added to ScoreModel come from the innermost model."""
    monkeypatch.setattr(ScoreModel, "made_up", 0, raising=False)
    monkeypatch.setattr(ScoreModel, "squared", property(lambda self: self.made_up**2), raising=False)
    monkeypatch.setattr(type(told), "tell", lambda self: f"tells {self.made_up}", raising=False)
    monkeypatch.setattr(ScoreModel, "tell", lambda self: "nothing", raising=False)
    outer = nested(told)
    told.made_up = 3
    assert (outer.made_up, outer.squared, outer.tell()) == (3, 9, "tells 3")
    outer.model.made_up = 4  # the wrapper in between has its own now
    assert (outer.made_up, told.made_up) == (4, 3)


def test_what_a_wrapper_sets_or_defines_is_its_own(told):
    """An attribute of the wrapper's own, and methods of ScoreModel's that work on it."""

    class Other(Same):
        sigma_data = 5.0

        @property
        def flow_end(self):
            return 0.5

    outer = Other(told)
    outer.event_shape, outer.data_mean = (9,), torch.zeros(9)
    assert (outer.sigma_data, outer.flow_end, outer.event_shape) == (5.0, 0.5, (9,))
    assert outer.data_mean.shape == (9,)
    assert told.data_mean.shape == (3,)
    outer.check_event((9,))
    assert (told.sigma_data, told.flow_end, told.event_shape) != (5.0, 0.5, (9,))
    with pytest.raises(ValueError, match="levels"):
        outer.levels = 1


def test_what_is_computed_is_not_delegated(told):
    """Noise, score and velocity follow the changed denoiser, not the inner model's own formulas."""

    class Half(WrappedModel):
        def denoise(self, x, t, cond=None):
            return 0.5 * self.model.denoise(x, t, cond)

    outer, x, t = Half(told), torch.ones(2, 3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    alpha, sigma = told.sde.alpha(t), told.sde.sigma(t)
    noise = (x - alpha * outer.denoise(x, t)) / sigma
    torch.testing.assert_close(outer.noise(x, t), noise)
    torch.testing.assert_close(outer.score(x, t), -noise / sigma)
    torch.testing.assert_close(outer.velocity(x, t), noise - outer.denoise(x, t))
    torch.testing.assert_close(outer.prepare(x, t[None]).denoise(x, 0.4), outer.denoise(x, t))
    with pytest.raises(TypeError, match="Half"):
        outer.save_pretrained("nowhere")


def test_a_wrapper_is_a_module_like_any():
    """Parameters, state_dict, casts, copies and a missing attribute."""
    net = ScoreNet(nn.Linear(2, 2), VPSDE(), event_shape=(2,), data_mean=torch.ones(2))
    outer = nested(net)
    assert set(outer.state_dict()) == {"model.model.net.weight", "model.model.net.bias"}
    assert [id(p) for p in outer.parameters()] == [id(p) for p in net.parameters()]
    outer.load_state_dict({k: torch.zeros_like(v) for k, v in outer.state_dict().items()})
    assert float(net.net.weight.abs().sum()) == 0.0
    assert outer.double().data_mean.dtype == torch.float64
    other = copy.deepcopy(outer)
    other.model.model.sigma_data = 3.0
    assert (other.sigma_data, outer.sigma_data) == (3.0, 1.0)
    with pytest.raises(AttributeError, match="no_such_thing"):
        outer.no_such_thing  # noqa: B018
    with pytest.raises(TypeError, match="ScoreModel"):
        Same(nn.Identity())


# -- clipping ---------------------------------------------------------------------------------------------------------

TRUTH = GaussianMixture.isotropic([[-0.8, 0.3], [0.6, -0.5], [0.2, 0.7]], 0.05)


class Echo(nn.Module):
    """Returns what it is given."""

    def forward(self, x, label):
        return 1.0 * x


class Roughly(nn.Module):
    """The noise of a mixture in a range that networks know, off by three percent: what training leaves."""

    def __init__(self, sde):
        super().__init__()
        self.truth = [TRUTH.diffuse(sde)]

    def forward(self, x, label):
        noise = self.truth[0].noise(x, label.double())
        return 0.97 * 4 * torch.tanh(noise / 4)


def cosine_steps(n=1000):
    """The discrete cosine schedule of Nichol & Dhariwal 2021, which ends at a signal of 5e-5."""
    product = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    return DiscreteVPSDE([min(1 - b / a, 0.999) for a, b in itertools.pairwise(product)])


@pytest.mark.parametrize("method", ["ddim", "dpm++2m", "ancestral"])
def test_clipping_saves_a_noise_network_without_terminal_signal(method):
    """Without it the first step is thrown far away; with it the samples are the data."""
    sde = cosine_steps()
    model, data = ScoreNet(Roughly(sde), sde, "noise"), TRUTH.sample(2000, seed=1).float()
    draw = lambda m: sample(m, (2000, 2), method=method, steps=100, seed=0)  # noqa: E731
    floor = sliced_wasserstein(TRUTH.sample(2000, seed=2).float(), data)
    plain, clipped = (sliced_wasserstein(draw(m), data) for m in (model, Clipped(model)))
    assert plain > 100
    assert clipped < 2 * floor


def test_clipped_is_the_clamped_denoiser():
    """Entry by entry, to the model's range or the one that is given; noise and gradient follow."""
    model = ScoreNet(Echo(), VPSDE(), "denoise", value_range=(0.0, 1.0))
    x, t = torch.tensor([[-0.5, 0.25], [0.75, 3.0]], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    assert torch.equal(Clipped(model).denoise(x, t), x.clamp(0, 1))
    assert torch.equal(Clipped(model, high=2.0).denoise(x, t), x.clamp(0, 2))
    assert torch.equal(Clipped(model, -1, 0.5).denoise(x, t), x.clamp(-1, 0.5))
    alpha, sigma = (expand(c(t), x) for c in (model.sde.alpha, model.sde.sigma))
    torch.testing.assert_close(Clipped(model).noise(x, t), (x - alpha * x.clamp(0, 1)) / sigma)
    jacobian = torch.func.jacrev(lambda v: Clipped(model).denoise(v, t))(x).sum((0, 1))
    assert torch.equal(jacobian, torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))


def test_clipping_nothing_changes_no_density(full3):
    """A range far outside of the data: the likelihood of the model itself."""
    model, x = full3.diffuse(VPSDE()), full3.sample(4, seed=0)
    got = log_prob(Clipped(model, -50, 50), x, rtol=1e-6, atol=1e-6).value
    torch.testing.assert_close(got, log_prob(model, x, rtol=1e-6, atol=1e-6).value, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("low", "high"), [(1, -1), (0, 0), (math.nan, 1), (0, math.inf), ("a", 1)])
def test_clipped_ranges_are_checked(low, high):
    with pytest.raises(ValueError, match=r"low < high|two numbers"):
        Clipped(ScoreNet(nn.Identity(), VPSDE()), low, high)
