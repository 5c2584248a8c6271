"""Descriptions by name and options: everything of the package and classes of one's own, there and back through a file."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from test_store import edited, mlp_model, part, quantized_model, shaken, unet_model
from torch import nn

from scoresde import SDE, VPSDE, ClassifierFreeGuidance, GaussianMixture, NoiseLabel, ScoreNet, load, store
from scoresde.models.base import ScoreModel
from scoresde.nets import MLP
from scoresde.sde import SDES
from scoresde.store import registry

DATA = Path(__file__).parent / "data" / "store"


@pytest.fixture(autouse=True)
def own_classes_end_with_the_test(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def through_json(value):
    """(description, object) after the description has been text."""
    tensors = {}
    description = json.loads(json.dumps(store.describe(value, tensors)))
    return description, store.build(description, tensors)


def same_outputs(a, b, shape, cond=None):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(a.denoise(x, 0.4, cond), b.denoise(x, 0.4, cond))


class Options(nn.Module):
    """Keeps what it is given, and nothing more."""

    def __init__(self, value, other=None):
        super().__init__()
        self.value, self.other = value, other

    def forward(self, x, label, cond=None):
        return 0.5 * x


VALUES = [
    None,
    True,
    3,
    -(2**70),
    0.1,
    float("inf"),
    "text",
    "$tensor",
    (1, 2.0, (3,)),
    [1, (2, [3])],
    {"a": 1, "b": (2,)},
    {"name": 1, "options": 2},
    {"$same": ""},
    {1: "one", (2, 3): "two"},
    {},
    np.float32(0.1),
    np.float64("nan"),
    np.int8(-7),
    np.uint64(2**64 - 1),
    np.bool_(True),
    np.float16(0.1),
    Fraction(-22, 7),
    torch.Size([2, 3]),
    NoiseLabel("sigma", 2.0),
    VPSDE(0.2, 9.0),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_options_come_back_as_what_they_were(value):
    """Numbers of NumPy, fractions, tuples, lists and dicts keep their types, through text."""
    store.register(Options)
    _, again = through_json(Options(value, (value,)))
    for got in (again.value, again.other[0]):
        if isinstance(value, torch.Size):
            value = tuple(value)
        assert type(got) is type(value)
        assert got == value or repr(got) == repr(value)
        if isinstance(value, (tuple, list)):
            assert repr(got) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_are_stored_with_the_weights(dtype, tmp_path):
    """A tensor among the options, such as the data's mean, is a tensor of the file, and part of what the model is."""
    store.register(Options)
    value = (torch.arange(6) % 3).reshape(2, 3).to(dtype)
    model = ScoreNet(Options({"mean": value, "none": None}), VPSDE())
    store.save_model(model, tmp_path)
    got = load(tmp_path).net.value["mean"]
    assert got.dtype == dtype
    assert torch.equal(got, value)
    assert list(store.read_tensors(tmp_path / "model.safetensors")[0]) == ["option:net.value.0"]
    other = ScoreNet(Options({"mean": value.roll(1), "none": None}), VPSDE())
    assert store.describe(other) != store.describe(model)
    assert store.model_digest(other) != store.model_digest(model)


@pytest.mark.parametrize("name", SDES)
def test_processes(name):
    """Each of the package, with its defaults."""
    sde = SDES[name]((0.1, 0.2)) if name == "DiscreteVPSDE" else SDES[name]()
    description, again = through_json(sde)
    assert description["name"] == name
    assert again == sde


def test_guidance_around_a_network(tmp_path):
    """A wrapper is saved with the network inside it; the label of no class, a tensor, comes back."""
    torch.manual_seed(0)
    model = shaken(ScoreNet(MLP(3, width=8, depth=1, embedding=4, classes=3), VPSDE()))
    guided = ClassifierFreeGuidance(model, 2.5, interval=(0.1, 3.0), unconditional=torch.tensor([3]))
    store.save_model(guided, tmp_path)
    again = load(tmp_path)
    assert (type(again), again.scale, again.interval) == (ClassifierFreeGuidance, 2.5, (0.1, 3.0))
    same_outputs(again, guided, (3,), torch.tensor([0, 2, 1]))
    described = json.loads((tmp_path / "config.json").read_text())["model"]
    assert described["options"]["model"]["options"]["net"]["name"] == "MLP"


def test_a_mixture(tmp_path):
    """An exact model is its tensors: the file gives the same density to the bit."""
    g = torch.Generator().manual_seed(0)
    mixture = GaussianMixture.isotropic(torch.randn(3, 4, generator=g), 0.2, [0.2, 0.3, 0.5], event_shape=(1, 2, 2))
    model = mixture.diffuse(VPSDE())
    store.save_model(model, tmp_path)
    same_outputs(load(tmp_path), model, (1, 2, 2))
    assert torch.equal(load(tmp_path).mixture.means, mixture.means)


def test_own_classes(tmp_path):
    """A registered network, schedule (which learns) and model of one's own; without registration the file says what to do."""

    @store.register
    class Plain(nn.Module):
        def __init__(self, width, scale=2.0, **more):  # keeps none of them
            super().__init__()
            self.line = nn.Linear(3, width)
            self.back = nn.Linear(width, 3)
            self.factor = nn.Parameter(torch.tensor(float(scale) + len(more)))

        def forward(self, x, label, cond=None):
            return self.factor * self.back(self.line(x))

    @store.register(name="my-schedule")
    class Learned(nn.Module, SDE):
        def __init__(self, rate):
            super().__init__()
            self.rate = rate
            self.log_rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64).log())

        def alpha(self, t):
            return torch.exp(-self.log_rate.exp() * t)

        def sigma(self, t):
            return torch.sqrt(-torch.expm1(-2 * self.log_rate.exp() * t))

    @store.register(options=lambda m: {"inner": m.model, "gain": m.c})
    class Wrapper(ScoreModel):
        def __init__(self, inner, gain):
            super().__init__()
            self.model, self.c, self.sde = inner, gain, inner.sde

        def denoise(self, x, t, cond=None):
            return self.c * self.model.denoise(x, t, cond)

    torch.manual_seed(0)
    model = shaken(Wrapper(ScoreNet(Plain(5, scale=3, a=1), Learned(4.0)), Fraction(1, 2)))
    model.c = 0.25
    store.save_model(model, tmp_path)
    again = load(tmp_path)
    same_outputs(again, model, (3,))
    assert again.c == 0.25
    assert torch.equal(again.sde.log_rate, model.sde.log_rate)
    registry._registered.clear()
    with pytest.raises(
        ValueError, match=r"model\.safetensors .*'Wrapper' is no class of scoresde, nor registered.*register"
    ):
        load(tmp_path)


def test_classes_that_compute_when_they_are_made(tmp_path):
    """What reads its own numbers in the constructor cannot be sketched without memory, and loads all the same."""

    @store.register
    class Reads(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.line = nn.Linear(3, 3)
            self.width = int(self.line.weight.abs().sum().item() * 0) + width

        def forward(self, x, label, cond=None):
            return self.line(x)

    model = ScoreNet(Reads(4), VPSDE())
    store.save_model(model, tmp_path)
    same_outputs(load(tmp_path), model, (3,))


def test_names_are_not_taken_twice():
    """Neither from the package nor from another class; the same class, defined again, takes its place."""

    class VPSDE:
        pass

    with pytest.raises(ValueError, match=r"'VPSDE' is the name of .*register\(name="):
        store.register(VPSDE)
    with pytest.raises(TypeError, match="takes a class"):
        store.register(VPSDE())
    for _ in range(2):

        @store.register
        class Mine(nn.Module):
            def __init__(self, a):
                super().__init__()
                self.a = a

    assert through_json(Mine(3))[1].a == 3


class Silent(nn.Module):
    def __init__(self, width):
        super().__init__()


def test_what_cannot_be_described():
    """Functions, unknown classes, subclasses and what contains itself: the error says where it stands."""
    store.register(Options)
    loop = []
    loop.append(loop)
    for value, message in (
        (len, "builtin_function_or_method"),
        (nn.Linear(1, 1), "Linear"),
        (Path("x"), "Path"),
        (np.zeros(2), "ndarray"),
        (1j, "complex"),
        (np.longdouble(1), "longdouble"),
        (loop, "contains itself"),
    ):
        with pytest.raises(TypeError, match=rf"option net\.value.*{message}"):
            store.describe(ScoreNet(Options(value), VPSDE()))
    monkey = Silent(3)
    registry._registered["Silent"] = Silent, None
    with pytest.raises(TypeError, match=r"Silent, does not keep its argument 'width'"):
        store.describe(monkey)


def test_one_network_in_two_places_stays_one(tmp_path):
    """Shared parts are described once, and shared again."""
    store.register(Options)
    shared = Options(1)
    twice = Options(shared, (shared, 2))
    description, again = through_json(twice)
    assert again.value is again.other[0]
    assert description["options"]["other"][0] == {"$same": "value"}


@pytest.mark.parametrize("kinds", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("make", [mlp_model, unet_model, quantized_model])
def test_two_precisions(make, kinds, tmp_path):
    """Parameters and buffers of two precisions each keep their own."""
    model = make()
    for i, value in enumerate((*model.parameters(), *model.buffers())):
        if value.is_floating_point():
            value.data = value.data.to(kinds[i % 2])
    store.save_model(model, tmp_path)
    again = load(tmp_path)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        got = again.get_parameter(name) if name in dict(model.named_parameters()) else again.get_buffer(name)
        assert got.dtype == value.dtype, name
        assert torch.equal(got, value), name


OLD = ("format1-unet", "format2-mlp", "format2-quantized")


@pytest.mark.parametrize("name", OLD)
def test_files_of_older_versions(name, recwarn):
    """Files that were written with format 1 and 2 give the outputs of then, and one warning that they carry no digest."""
    model = load(DATA / f"{name}.safetensors")
    shape = model.event_shape
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    expected = torch.tensor(json.loads((DATA / "denoised.json").read_text())[name], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.denoise(x, 0.4).double().flatten(), expected, rtol=1e-6, atol=1e-6)
    assert len([w for w in recwarn if "before files carried a digest" in str(w.message)]) == 1


@pytest.mark.parametrize(
    "change",
    [
        part("value_range", {"$list": [0, "x"]}),
        part("value_range", (0, 1, "x")[:1]),
        part("sigma_data", "wide"),
        part("sigma_data", -1.0),
        part("label", {"name": "NoiseLabel", "options": {"quantity": "x"}}),
        part("label", 3),
        part("parameterization", 7),
        part("event_shape", 5),
        part("net", {"name": "MLP", "options": {"dim": "x"}}),
        part("net", {"name": "MLP", "options": {"dim": [[3]]}}),
        part("net", {"name": "MLP", "options": {"dim": 3, "width": -8}}),
        part("sde", {"name": "VPSDE", "options": {"beta_max": None}}),
        part("sde", 3),
    ],
    ids=range(13),
)
def test_options_of_the_wrong_kind_name_the_file(change, tmp_path):
    """Whatever a constructor raises, or what does not fit afterwards, is one ValueError with the file's name."""
    store.save_model(mlp_model(), tmp_path)
    edited(tmp_path / "model.safetensors", lambda t: None, change)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(tmp_path)


def test_weights_of_another_kind(tmp_path):
    """Integers where floating-point numbers belong are refused, not converted."""
    store.save_model(mlp_model(), tmp_path)
    edited(tmp_path / "model.safetensors", lambda t: t.update({"net.leave.bias": torch.zeros(3, dtype=torch.int32)}))
    with pytest.raises(ValueError, match=r"of another type: net\.leave\.bias: file torch\.int32, model torch\.float32"):
        load(tmp_path)
