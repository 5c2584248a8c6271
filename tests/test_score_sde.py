"""Checkpoints of score_sde_pytorch: outputs of the original code, and what is said of files and options that do not fit."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import scoresde
from scoresde import VESDE, DiscreteVPSDE, SubVPSDE, load
from scoresde.interop import load_score_sde
from scoresde.interop.files import Weights
from scoresde.interop.score_sde import PUBLISHED, build_score_sde

DATA = Path(__file__).parent / "data"
SHARED = Path(scoresde.__file__).parents[2] / "shared" / "reference"
CASES = ("subvp_ddpmpp", "ve_ncsnpp", "ve_ncsnpp_skip", "vp_ddpm_discrete", "ve_ncsnpp_discrete")
OFFICIAL = {
    "score_sde_vp_ddpmpp": "vp/cifar10_ddpmpp_continuous",
    "score_sde_ve_ncsnpp": "ve/cifar10_ncsnpp_continuous",
}


def read(name):
    """(state dict, names of the trainable tensors, options, reference) of a file in `tests/data`."""
    case = torch.load(DATA / f"{name}.pt", weights_only=True)
    draws, tensors, trained = np.random.RandomState(case["seed"]), {}, []  # whose numbers NumPy keeps as they are
    for key, shape, exponent, offset in json.loads(case["order"]):
        if exponent is None:
            tensors[key] = case["rest"][key]
            continue
        whole = torch.from_numpy(draws.randint(-127, 128, tuple(shape), dtype=np.int8))
        tensors[key] = offset + whole.float() * 2.0**exponent
        trained.append(key)
    return tensors, trained, json.loads(case["config"]), case["reference"]


def checkpoint(name):
    """What the original's trainer would save: averages apart, as a list, and a NumPy number in the optimizer's state."""
    tensors, trained, options, reference = read(name)
    shadow = [tensors[k].flatten().roll(1).reshape(tensors[k].shape) for k in trained]
    group = dict(lr=np.float64(2e-4), betas=(0.9, 0.999), eps=1e-8, params=list(range(len(trained))))
    state = dict(
        optimizer=dict(state={}, param_groups=[group]),
        model=tensors,
        ema=dict(decay=0.999, num_updates=3, shadow_params=shadow),
        step=3,
    )
    return state, options, reference


def publish(name, folder, change=None, options=None):
    """Write a case as it is published, `change(state)` applied; returns the checkpoint's file and the reference."""
    state, own, reference = checkpoint(name)
    if change is not None:
        change(state)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "checkpoint_8.pth")
    if options is not False:
        (folder / "config.json").write_text(json.dumps(own if options is None else options))
    return folder / "checkpoint_8.pth", reference


def options_of(name, /, **model):
    """The options of a case, with others in the model's section."""
    options = copy.deepcopy(read(name)[2])
    options["model"] |= model
    return options


def worst(got, expected):
    """The largest relative error of a sample."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    difference = (got.double() - expected.double()).flatten(1).norm(dim=1)
    return float((difference / expected.double().flatten(1).norm(dim=1)).max())


def same(a, b, t=0.3):
    """Whether two models give the same scores, to the bit."""
    x = torch.randn(2, *a.event_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return torch.equal(a.score(x, t), b.score(x, t))


def mean_and_std(options, t):
    """alpha and sigma at t, by the formulas of Song et al. 2021, and of Ho et al. 2020 for the discrete process."""
    t, net = t.double(), options["model"]
    if options["training"]["sde"] == "vesde":
        return torch.ones_like(t), net["sigma_min"] * (net["sigma_max"] / net["sigma_min"]) ** t
    low, high = net["beta_min"], net["beta_max"]
    if not options["training"]["continuous"]:
        n = net["num_scales"]
        bar = torch.cumprod(1 - torch.linspace(low / n, high / n, n, dtype=torch.float64), 0)
        bar = bar[(t * (n - 1)).round().long()]
        return bar.sqrt(), (1 - bar).sqrt()
    bar = torch.exp(-low * t - 0.5 * (high - low) * t**2)
    return bar.sqrt(), 1 - bar if options["training"]["sde"] == "subvpsde" else (1 - bar).sqrt()


def compare(model, reference, which, options, tolerance=1e-5):
    """Score, data and noise predictions and drift of the probability flow against the original's."""
    x, t, score = reference["x"], reference["t"], reference[f"{which}_score"]
    alpha, sigma = (v[:, None, None, None] for v in mean_and_std(options, t))
    with torch.no_grad():
        assert worst(model.score(x, t), score) < tolerance
        assert worst(model.denoise(x, t), ((x + sigma**2 * score) / alpha).float()) < tolerance
        assert worst(model.noise(x, t), (-sigma * score).float()) < tolerance
        if f"{which}_drift_pf" in reference:
            # the original's drift of a discrete VP model is that of the continuous process
            loose = isinstance(model.sde, DiscreteVPSDE)
            drift = worst(model.velocity(x, t), reference[f"{which}_drift_pf"])
            assert drift < (0.02 if loose else tolerance)
            assert drift > 1e-4 or not loose


@pytest.mark.parametrize("name", CASES)
def test_outputs_of_the_original(name, tmp_path):
    """Averaged and raw weights give the original's scores and drifts, from the folder, and from the file with options."""
    file, reference = publish(name, tmp_path / "a")
    model = load(tmp_path / "a")
    options = read(name)[2]
    compare(model, reference, "ema", options)
    compare(load_score_sde(file, ema=False), reference, "model", options)
    assert not model.training
    assert model.event_shape == reference["x"].shape[1:]
    alone = tmp_path / "alone" / "checkpoint_8.pth"
    alone.parent.mkdir()
    file.rename(alone)
    assert same(load(alone, config=options), model)
    assert same(load(alone, config=tmp_path / "a" / "config.json"), model)
    labels = model.label(model.sde, reference["t"].double())
    expected = reference["labels"].double()
    if name in ("ve_ncsnpp", "ve_ncsnpp_skip"):
        expected = expected.log()
    torch.testing.assert_close(labels, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("folder", OFFICIAL)
@pytest.mark.skipif(not SHARED.is_dir(), reason="without the reference checkpoints")
def test_official_references(folder):
    """The larger references: from their folder, with the options as a file, and by the name of the published ones."""
    place = SHARED / folder
    reference = torch.load(place / "reference.pt", weights_only=True)
    options = json.loads((place / "config.json").read_text())
    for model in (
        load(place),
        load(place / "checkpoint_0.pth", config=str(place / "config.json")),
        load(place, config=OFFICIAL[folder]),
    ):
        compare(model, reference, "ema", options)
    compare(load_score_sde(place, ema=False), reference, "model", options)


def test_what_a_model_says_of_its_data(tmp_path):
    """VE data lie in [0, 1], the others in [-1, 1], in 256 levels; the process has the options' constants."""
    publish("ve_ncsnpp_skip", tmp_path / "ve")
    ve = load(tmp_path / "ve")
    assert (ve.sde, ve.value_range, ve.levels, ve.parameterization) == (
        VESDE(0.01, 348),
        (0.0, 1.0),
        256,
        "scaled_score",
    )
    publish("subvp_ddpmpp", tmp_path / "vp")
    vp = load(tmp_path / "vp")
    assert (vp.sde, vp.value_range, vp.levels, vp.parameterization) == (SubVPSDE(), (-1.0, 1.0), 256, "noise")


def test_the_newest_of_several(tmp_path):
    """Numbers are compared as numbers: checkpoint_12 is newer than checkpoint_8; so in a run's folder checkpoints/."""
    file, _ = publish("ve_ncsnpp_discrete", tmp_path / "checkpoints")
    options = tmp_path / "checkpoints" / "config.json"
    state = torch.load(file, weights_only=False)
    state["ema"]["shadow_params"] = [v + 0.1 for v in state["ema"]["shadow_params"]]
    torch.save(state, tmp_path / "checkpoints" / "checkpoint_12.pth")
    assert same(load(tmp_path), load(file.with_name("checkpoint_12.pth"), config=options))
    assert not same(load(tmp_path), load(file))


COUNTS = {  # trainable parameters of the original's networks
    62_758_787: "ve/cifar10_ncsnpp_continuous",
    107_586_947: "ve/cifar10_ncsnpp_deep_continuous",
    61_804_419: "cifar10_ddpmpp cifar10_ddpmpp_continuous",
    106_632_579: "cifar10_ddpmpp_deep_continuous",
    62_693_251: "cifar10_ncsnpp cifar10_ncsnpp_continuous",
    107_521_411: "cifar10_ncsnpp_deep_continuous",
    35_218_947: "cifar10_ddpm cifar10_ddpm_continuous ddpm/cifar10 ddpm/cifar10_continuous",
    111_569_923: "ddpm/bedroom ddpm/celebahq ddpm/church",
    65_574_421: " ".join(f"{n}_ncsnpp_continuous" for n in ("bedroom", "church", "celebahq_256", "ffhq_256")),
    105_785_880: "celebahq_ncsnpp_continuous ffhq_ncsnpp_continuous",
}


@pytest.mark.parametrize("name", [n for n in PUBLISHED if PUBLISHED[n]["model"]["name"] in ("ddpm", "ncsnpp")])
def test_published_sizes(name):
    """Each published configuration builds, with as many trainable parameters as the original has."""
    with torch.device("meta"):
        model = build_score_sde(PUBLISHED[name], Weights({}, "nothing"))
    known = {n: count for count, names in COUNTS.items() for n in names.split()}
    expected = known[name] if name in known else known[name.split("/", 1)[1]]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert isinstance(model.sde, DiscreteVPSDE) == (name.startswith("vp") and not name.endswith("continuous"))


def test_the_width_is_read_off_the_weights(tmp_path):
    """So a published name serves narrower networks; the options' own nf need not be right."""
    file, reference = publish("ve_ncsnpp", tmp_path, options=options_of("ve_ncsnpp", nf=128))
    compare(load(file), reference, "ema", read("ve_ncsnpp")[2])


def test_other_forms_of_options(tmp_path):
    """YAML, a ConfigDict, and a published name written as its file's: the same model."""
    file, _ = publish("ve_ncsnpp", tmp_path)
    model, options = load(file), read("ve_ncsnpp")[2]

    class ConfigDict:
        def to_dict(self):
            return options

    yaml = pytest.importorskip("yaml")
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    assert same(load(file, config=tmp_path / "options.yaml"), model)
    assert same(load(file, config=ConfigDict()), model)
    with pytest.raises(ValueError, match="do not fit the network"):  # found, though it describes another network
        load(file, config="configs/ve/cifar10_ncsnpp_continuous.py")
    with pytest.raises(TypeError, match="config must be a dict"):
        load(file, config=3)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 40, 0.3, 0.9, 0.9999])
def test_truncated(keep, tmp_path):
    """Cut off anywhere, the file is named and called damaged."""
    file, _ = publish("ve_ncsnpp", tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"checkpoint_8\.pth .*(truncated or damaged|not a readable)"):
        load(tmp_path)


def drop(state, name):
    """Without a parameter and its average."""
    place = read("subvp_ddpmpp")[1].index(name)
    del state["model"][name], state["ema"]["shadow_params"][place]


CHANGES = {
    "missing": (lambda s: drop(s, "module.all_modules.3.Conv_0.weight"), r"missing: all_modules\.3\.Conv_0\.weight"),
    "extra": (
        lambda s: (
            s["model"].update({"module.all_modules.99.weight": torch.zeros(2)}),
            s["ema"]["shadow_params"].append(torch.zeros(2)),
        ),
        r"left over: all_modules\.99\.weight",
    ),
    "shape": (
        lambda s: (
            s["model"].update({"module.all_modules.0.weight": torch.zeros(32, 9)}),
            s["ema"]["shadow_params"].__setitem__(0, torch.zeros(32, 9)),
        ),
        r"of another shape: embed\.first\.weight: \(32, 9\)",
    ),
    "short": (lambda s: s["ema"]["shadow_params"].pop(), r"averaged parameters in .* are not those of its"),
    "swapped": (lambda s: s["ema"]["shadow_params"].reverse(), r"averaged parameters in .* are not those of its"),
    "no-average": (lambda s: s.pop("ema"), r"no averaged parameters .*ema=False"),
    "no-model": (lambda s: s.pop("model"), r"written by another program|is no checkpoint of score_sde_pytorch"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_do_not_fit(kind, tmp_path):
    """What is missing, left over or of another shape is named, and the file; averages are counted."""
    change, message = CHANGES[kind]
    file, _ = publish("subvp_ddpmpp", tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(file) in str(error.value)
    if kind == "no-average":
        assert load_score_sde(tmp_path, ema=False) is not None


OTHERS = [dict(ch_mult=[1, 1]), dict(ch_mult=[1, 2, 2]), dict(num_res_blocks=2), dict(attn_resolutions=[4])]
OTHERS += [dict(resblock_type="ddpm", fir=False), dict(fir=False), dict(name="ddpm")]
OTHERS += [dict(progressive_input="none"), dict(progressive_input="input_skip"), dict(progressive="output_skip")]


@pytest.mark.parametrize("model", OTHERS, ids=str)
def test_options_of_another_network(model, tmp_path):
    """Weights that the options do not describe are refused, and the options are named as a cause."""
    file, _ = publish("ve_ncsnpp", tmp_path, options=options_of("ve_ncsnpp", **model))
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert str(file) in str(error.value) or "VE checkpoints have Fourier" in str(error.value)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", dict(name="ncsnv2"), "'ncsnv2' is not supported"),
        ("model", dict(nonlinearity="elu"), "nonlinearity 'elu' is not supported"),
        ("model", dict(normalization="InstanceNorm"), "normalization"),
        ("model", dict(conditional=False), "without noise labels"),
        ("model", dict(resamp_with_conv=False), "bare resampling"),
        ("model", dict(progressive="residual"), "does not run in the original"),
        ("model", dict(resblock_type="ddpm", fir=True), "does not run in the original"),
        ("model", dict(embedding_type="positional"), "Fourier embeddings if continuous"),
        ("training", dict(sde="vpsde"), "Fourier embeddings are supported for the VE SDE only"),
    ],
)
def test_options_that_are_not_supported(section, change, message, tmp_path):
    """Each is refused by its name, before anything is computed."""
    options = options_of("ve_ncsnpp")
    options[section] |= change
    publish("ve_ncsnpp", tmp_path, options=options)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_options_that_are_not_there(tmp_path):
    """No options, an incomplete section, a Python file, an unknown name: each error says what to give."""
    file, _ = publish("ve_ncsnpp", tmp_path, options=False)
    with pytest.raises(ValueError, match=r"does not carry its options; give config=.*ve/cifar10_ncsnpp_continuous"):
        load(file)
    options = options_of("ve_ncsnpp")
    del options["model"]["ch_mult"]
    with pytest.raises(ValueError, match="lacks the option 'ch_mult'"):
        load(file, config=options)
    with pytest.raises(ValueError, match="unknown SDE 'edm'"):
        load(file, config=read("subvp_ddpmpp")[2] | {"training": {"sde": "edm", "continuous": True}})
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"own\.py is Python, which is not executed"):
        load(file, config=str(tmp_path / "own.py"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=r"neither a configuration file .*known: ve/"):
        load(file, config="ve/cifar10")
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*nowhere\.json"):
        load(file, config=tmp_path / "nowhere.json")
    for text in ("{", "[1]"):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=r"broken\.json"):
            load(file, config=tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint_N\.pth"):
        load_score_sde(tmp_path / "..")
