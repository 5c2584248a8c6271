"""NCSN and NCSNv2: outputs of the original architecture, derivatives, and what is said of options that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import scoresde
from scoresde import VESDE
from scoresde.interop.files import Weights
from scoresde.interop.score_sde.ncsn import NCSN_MODELS, PUBLISHED_NCSN, build_ncsn, ncsn_weights
from scoresde.models.network import NoiseLabel
from scoresde.nets.refinenet import InstanceNormPlus, RefineNet
from scoresde.store import save_model

DATA = Path(__file__).parent / "data"
CASES = ("v1", "v2_64", "v2_128", "v2_256")


def read(name):
    """(state dict, names of the trainable tensors, options, reference) of a file in `tests/data`."""
    case = torch.load(DATA / f"ncsn_{name}.pt", weights_only=True)
    tensors, trained, place = {}, [], 0
    for key, shape, exponent in json.loads(case["order"]):
        if exponent is None:
            tensors[key] = case["rest"][key]
            continue
        count = int(np.prod(shape))
        tensors[key] = case["packed"][place : place + count].reshape(shape).float() * 2.0**exponent
        trained.append(key)
        place += count
    return tensors, trained, json.loads(case["config"]), case["reference"]


def load(name):
    """(the model of a case with its weights, its options, the reference)."""
    tensors, _, options, reference = read(name)
    weights = Weights(tensors, name)
    model = build_ncsn(options, weights)
    model.net = weights.fill(model.net, ncsn_weights(model.net, weights))
    return model.eval(), options, reference


def worst(got, expected):
    """The largest relative error of a sample."""
    assert got.shape == expected.shape
    return float(((got.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


def times(reference):
    """The t of the levels whose numbers the original was given."""
    return 1 - reference["labels"].double() / (len(reference["sigmas"]) - 1)


@pytest.mark.parametrize("name", CASES)
def test_outputs_of_the_original(name):
    """Scores, noise and the network's own output at levels of the table, first, middle and last."""
    model, _, reference = load(name)
    x, t, labels, score = reference["x"], times(reference), reference["labels"], reference["score"]
    sigma = reference["sigmas"][labels][:, None, None, None]
    with torch.no_grad():
        assert worst(model.score(x, t), score) < 1e-5
        assert worst(model.noise(x, t), -sigma * score) < 1e-5
        assert worst(model.denoise(x, t) - x, sigma**2 * score) < 1e-3  # what is left of the larger x
        assert worst(model.net(x, labels.float()), score if name == "v1" else sigma * score) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_levels_and_settings(name):
    """The process passes through the original's levels at the labels' times; the settings are those of their data."""
    model, options, reference = load(name)
    steps, data = options["model"]["num_scales"], options["data"]
    t = torch.linspace(1, 0, steps, dtype=torch.float64)
    torch.testing.assert_close(model.sde.sigma(t), reference["sigmas"], rtol=1e-12, atol=0)
    torch.testing.assert_close(model.label(model.sde, t), torch.arange(steps).double(), rtol=0, atol=1e-12)
    assert model.sde == VESDE(0.01, options["model"]["sigma_max"])
    assert model.label == NoiseLabel("time", 1.0 - steps, steps - 1.0)
    assert model.parameterization == ("score" if name == "v1" else "scaled_score")
    assert model.event_shape == (data["num_channels"], data["image_size"], data["image_size"])
    settings = (model.levels, model.value_range, model.sigma_data)
    assert settings == ((256, (-1, 1), 0.5) if data["centered"] else (256, (0, 1), 0.25))
    assert model.net.rescale_input is not data["centered"]


def test_labels():
    """NCSN rounds to a level and stops at the ends of the table; NCSNv2 does not look at its label."""
    net, x = load("v1")[0].net, torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        at = {v: net(x, torch.tensor([v])) for v in (2.0, 2.4, 3.0, -0.2, 0.0, 9.0, 9.7)}
        for same in ((2.0, 2.4), (-0.2, 0.0), (9.7, 9.0)):
            assert torch.equal(at[same[0]], at[same[1]])
        assert not torch.allclose(at[2.0], at[3.0])
        net, x = load("v2_64")[0].net, torch.randn(1, 1, 28, 28)
        assert torch.equal(net(x, torch.tensor([0.0])), net(x, torch.tensor([float("nan")])))


def test_norm():
    """By its definition: means removed, standardized over the channels with c - 1, and given back in part."""
    x = 3 * torch.randn(2, 5, 4, 6, dtype=torch.float64) + 2 * torch.randn(2, 5, 1, 1, dtype=torch.float64)
    norm = InstanceNormPlus(5, steps=3).double()
    with torch.no_grad():
        norm.table.normal_()
    index = torch.tensor([2, 0])
    gamma, alpha, beta = (v[..., None, None] for v in norm.table[index].chunk(3, 1))
    m = x.mean((2, 3), keepdim=True)
    normed = (x - m) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    share = (m - m.mean(1, keepdim=True)) / (m.var(1, correction=1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x, index), gamma * (normed + alpha * share) + beta)


@pytest.mark.parametrize("name", ["v1", "v2_64", "v2_128"])
def test_forward_and_reverse_mode_agree(name):
    """u' J v in forward mode, reverse mode and by differences, in float64; a second derivative exists."""
    model, _, reference = load(name)
    net, label = model.net.double(), reference["labels"][:1].double()
    x = reference["x"][:1].double() / reference["sigmas"][reference["labels"][0]]
    g = torch.Generator().manual_seed(1)
    u, v = (torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(2))

    def f(x):
        return net(x, label)

    forward = float((u * torch.func.jvp(f, (x,), (v,))[1]).sum().detach())
    at = x.clone().requires_grad_()
    (back,) = torch.autograd.grad(f(at), at, u, create_graph=True)
    assert float((back * v).sum().detach()) == pytest.approx(forward, rel=1e-10)
    h = 1e-7
    with torch.no_grad():
        assert float((u * (f(x + h * v) - f(x - h * v))).sum() / (2 * h)) == pytest.approx(forward, rel=1e-3)
    (second,) = torch.autograd.grad((back * v).sum(), at)
    assert 0 < second.norm() < float("inf")


def test_gradients_reach_every_parameter():
    """Also the rows of other noise levels, whose gradient is zero."""
    net = RefineNet(2, (8, 16), width=4, steps=3)
    net(torch.randn(2, 2, 8, 16), torch.tensor([0.0, 1.0])).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in net.parameters())
    assert [bool(row.any()) for row in net.leave.norm.table.grad] == [True, True, False]


def test_sizes_and_rebuilding():
    """Another number of channels, sizes that are not square, one after the other; `config` rebuilds the network."""
    options = dict(width=4, multipliers=[1, 2, 2], dilations=[1, 1, 2], activation="swish", pool="mean", steps=3)
    net = RefineNet(2, [8, 12], **options)
    again = RefineNet(**json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    assert again.config == net.config
    label = torch.tensor([0.0, 2.0])
    for size in ((8, 12), (16, 10)):
        x = torch.randn(2, 2, *size)
        assert torch.equal(net(x, label), again(x, label))
        assert net(x, label).shape == x.shape
        torch.testing.assert_close(net(x, label)[1:], net(x[1:], label[1:]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 2"):
        net(torch.randn(1, 2, 8, 9), label[:1])
    with pytest.raises(ValueError, match="no condition"):
        net(torch.randn(1, 2, 8, 8), label[:1], torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="gelu"), "unknown activation 'gelu'"),
        (dict(pool="sum"), "unknown pool"),
        (dict(dilations=(1, 1)), "one entry for each"),
        (dict(multipliers=(1, 2, 2, 4)), "last two multipliers"),
        (dict(width=1), "two channels"),
        (dict(steps=-1), "steps must be at least 0, got -1"),
        (dict(size=(8,)), "two spatial axes"),
        (dict(size=(2, 8)), "4 at least"),
    ],
)
def test_network_options(change, message):
    """Options that do not fit are named."""
    with pytest.raises(ValueError, match=message):
        RefineNet(**dict(in_channels=1, size=(8, 8), width=4) | change)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", dict(name="ncsnv3"), "known are ncsn, ncsnv2_64, ncsnv2_128, ncsnv2_256"),
        ("model", dict(normalization="VarianceNorm"), "normalization 'VarianceNorm'"),
        ("model", dict(interpolation="nearest"), "interpolation 'nearest'"),
        ("model", dict(nonlinearity="gelu"), "unknown nonlinearity 'gelu'"),
        ("model", dict(scale_by_sigma=False), "always divided"),
        ("model", dict(name="ncsn"), "never divided"),
        ("model", dict(num_scales=1), "num_scales must be 2"),
        ("model", dict(num_scales=13), "12 from 50 to 0.01, are not those of its configuration, 13 from 50"),
        ("model", dict(sigma_max=49), "are not those of its configuration, 12 from 49"),
        ("data", dict(image_size=27), "two spatial axes"),
        ("training", dict(sde="vpsde"), "'vpsde' does not go with ncsnv2_64"),
        ("training", dict(continuous=True), "discrete noise levels"),
        ("model", None, "lacks the option 'name'"),
        ("data", None, "lacks the option 'image_size'"),
    ],
)
def test_options_of_the_original(section, change, message):
    """Options that the original does not have, or that do not fit the weights, are named."""
    tensors, _, options, _ = read("v2_64")
    options[section] = {} if change is None else options[section] | change
    with pytest.raises(ValueError, match=message):
        build_ncsn(options, Weights(tensors, "the file"))


def test_weights_of_another_network():
    """A second-generation file under the first generation's options is refused with names."""
    tensors, _, options, _ = read("v2_64")
    options["model"] |= dict(name="ncsn", scale_by_sigma=False)
    weights = Weights(tensors, "the file")
    model = build_ncsn(options, weights)
    with pytest.raises(ValueError, match=r"the file .* missing: .*embed\.weight.*left over"):
        weights.fill(model.net, ncsn_weights(model.net, weights))


COUNTS = {"ve/ncsn/cifar10": 30_117_635, "ve/ncsn/cifar10_1245": 39_750_659, "ve/ncsn/celeba_124": 51_379_715}
COUNTS |= {"ve/ncsnv2/cifar10": 29_694_083, "ve/ncsnv2/bedroom": 83_445_379, "ncsnv2_256": 94_132_611}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_published_sizes(name, count):
    """Published configurations have as many parameters as the original architecture at their width."""
    with torch.device("meta"):
        if name in PUBLISHED_NCSN:
            net = build_ncsn(PUBLISHED_NCSN[name], Weights({}, name)).net
        else:
            net = RefineNet(3, (256, 256), **NCSN_MODELS[name])
    assert sum(p.numel() for p in net.parameters()) == count
    assert len(PUBLISHED_NCSN) == 11


@pytest.mark.parametrize("name", ["v1", "v2_128"])
def test_folder(name, tmp_path):
    """A checkpoint as the trainer writes it, averages apart, through `scoresde.load`; saved as ours it is the same model."""
    tensors, trained, options, reference = read(name)
    shadow = [tensors[k] for k in trained]
    raw = tensors | {k: torch.zeros_like(tensors[k]) for k in trained}
    state = dict(optimizer={}, model={f"module.{k}": v for k, v in raw.items()}, ema=dict(shadow_params=shadow), step=3)
    torch.save(state, tmp_path / "checkpoint_0.pth")
    (tmp_path / "config.json").write_text(json.dumps(options))
    model = scoresde.load(tmp_path)
    with torch.no_grad():
        score = model.score(reference["x"], times(reference))
        assert worst(score, reference["score"]) < 1e-5
        save_model(model, tmp_path / "ours")
        assert torch.equal(scoresde.load(tmp_path / "ours").score(reference["x"], times(reference)), score)
