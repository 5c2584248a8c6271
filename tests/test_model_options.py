"""What a model says of its data: checked wherever it is set, kept apart from its weights."""

import copy
import math

import pytest
import torch
from torch import nn

from scoresde import VPSDE, GaussianMixture, NoiseLabel, QuantizedScoreNet, ScoreModel, ScoreNet
from scoresde.nets import MLP, LeanUNet

BAD = {
    "levels": ["x", -1, 1, True, 2.0, math.nan],
    "value_range": [(1.0, -1.0), (0.0, 0.0), (0.0, 1.0, 2.0), (0.0,), (math.nan, 1.0), (0.0, math.inf), "01", 3.0],
    "event_shape": [["a"], (), (0, 2), (2.0,), (True,), "23", 4],
    "sigma_data": [0.0, -1.0, math.nan, math.inf, "1", True, None],
    "data_mean": [0.0, [0.0, 0.0], torch.zeros(2, dtype=torch.long), torch.tensor([math.nan, 0.0]), torch.zeros(3)],
}


def scorenet(**options):
    return ScoreNet(nn.Identity(), VPSDE(), **options)


def quantized(levels=4, **options):
    return QuantizedScoreNet(nn.Identity(), VPSDE(), levels, **options)


class Own(ScoreModel):
    """A user's model, which sets its attributes itself."""

    def __init__(self, **options):
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)

    def denoise(self, x, t, cond=None):
        return x


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=str)
@pytest.mark.parametrize("make", [scorenet, quantized, Own])
def test_bad_options_are_refused_where_they_are_set(make, name, value):
    """In the constructor and by assignment later, in words that name the option."""
    options = {"event_shape": (2,)} if name == "data_mean" else {}
    with pytest.raises((TypeError, ValueError), match=name):
        make(**options, **{name: value})
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(make(**options), name, value)


def test_options_are_kept_as_plain_values():
    """Lists become tuples, integers floats; None stays for what is not known."""
    for model in (scorenet(levels=256, value_range=[0, 1], event_shape=[3, 8, 8]), Own(event_shape=[2])):
        assert isinstance(model.event_shape, tuple)
    model = scorenet(levels=256, value_range=[0, 1])
    assert repr(model.value_range) == "(0.0, 1.0)"
    assert [getattr(scorenet(), name) for name in ("levels", "event_shape", "data_mean")] == [None] * 3


def test_more_levels_than_a_network_can_have():
    """A million levels would be a million outputs a pixel."""
    with pytest.raises(ValueError, match="at most 65536"):
        quantized(10**6)


@pytest.mark.parametrize("label", [{"scale": 0.0}, {"scale": math.nan}, {"shift": math.inf}, {"scale": "2"}])
def test_noise_labels_must_tell_times_apart(label):
    """A scale of 0 or of no number says nothing of the time."""
    with pytest.raises((TypeError, ValueError), match=next(iter(label))):
        NoiseLabel("time", **label)


def test_data_mean_moves_with_the_model_but_is_no_weight():
    """A buffer outside of the state_dict: cast, copied and replaced with the model."""
    model = scorenet(event_shape=(2,), data_mean=torch.tensor([1.0, -2.0]))
    assert "data_mean" not in model.state_dict()
    assert model.double().data_mean.dtype == torch.float64
    assert torch.equal(copy.deepcopy(model).data_mean, model.data_mean)
    assert model.to("meta").data_mean.is_meta
    model = scorenet()
    model.data_mean = torch.ones(2)
    model.data_mean = torch.zeros(2)
    assert torch.equal(model.data_mean, torch.zeros(2))
    assert not model.state_dict()
    model.data_mean = None
    assert model.data_mean is None


def test_data_mean_of_a_mixture_is_exact():
    """sum_k w_k mu_k, in the shape of one example."""
    mixture = GaussianMixture(
        [0.25, 0.75], [[0.0, 4.0], [4.0, 0.0]], torch.eye(2).expand(2, 2, 2), event_shape=(1, 2, 1)
    )
    expected = torch.tensor([3.0, 1.0], dtype=torch.float64).reshape(1, 2, 1)
    assert torch.equal(mixture.diffuse(VPSDE()).data_mean, expected)


@pytest.mark.parametrize("kind", ["ScoreNet", "QuantizedScoreNet"])
def test_data_mean_is_saved_with_the_model(kind, tmp_path):
    """As an option beside the weights, to the bit."""
    mean = torch.linspace(-1, 1, 3)
    options = dict(event_shape=(3,), data_mean=mean)
    if kind == "ScoreNet":
        model = ScoreNet(MLP(3, width=8, depth=1), VPSDE(), **options)
    else:
        net = LeanUNet(QuantizedScoreNet.input_channels(1), 4, (4, 4), channels=(8,), blocks=(1,), attention=False)
        mean = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
        model = QuantizedScoreNet(net, VPSDE(), 4, event_shape=(1, 4, 4), data_mean=mean)
    model.save_pretrained(tmp_path)
    assert torch.equal(ScoreModel.from_pretrained(tmp_path).data_mean, mean)
