"""EDM's networks as state dicts: outputs of the original code under its preconditionings, and what is refused."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from test_pickles import EasyDict, Persistent, written
from test_score_sde import SHARED, read, worst
from torch import nn

from scoresde import EDMSDE, VESDE, VPSDE, DiscreteVPSDE, load
from scoresde.interop import edm, load_edm
from scoresde.sde import SDES

CASES = ("edm_ncsnpp", "vp_ddpmpp_cond", "edm_adm_cond")


def write(name, folder, change=None, config=True):
    """A case as a state dict with its constructor arguments beside it; returns the file and the reference."""
    tensors, _, options, reference = read(name)
    if change is not None:
        change(tensors)
    torch.save(tensors, folder / "state.pt")
    if config:
        (folder / "config.json").write_text(json.dumps(options))
    return folder / "state.pt", reference


def time_of(model, sigma):
    """The time, float64, at which the noise level sigma / alpha is `sigma`, and alpha there."""
    t = model.sde.time(-2 * sigma.double().log())
    return t, model.sde.alpha(t)[:, None, None, None]


def denoised(model, x, sigma, cond=None):
    """D(x; sigma) in EDM's variables, where the data are x / alpha."""
    t, alpha = time_of(model, sigma)
    with torch.no_grad():
        return model.denoise((alpha * x.double()).float(), t, cond)


def error(got, expected, x):
    """The largest relative error of a sample, of D and of what D takes off x."""
    return max(worst(got, expected), worst(got - x, expected - x))


@pytest.mark.parametrize("name", CASES)
def test_outputs_of_the_original(name, tmp_path):
    """The denoiser is the original's, without a class, with labels and with one-hot rows; the score is (D - x) / sigma^2."""
    file, reference = write(name, tmp_path)
    x, sigma = reference["x"], reference["sigma"]
    options = json.loads((tmp_path / "config.json").read_text())
    for model in (load(tmp_path), load(file, config=options), load(file, config=tmp_path / "config.json")):
        assert error(denoised(model, x, sigma), reference["denoised"], x) < 1e-5
        assert not model.training
    if "class_labels" in reference:
        for cond in (reference["class_labels"], reference["class_labels"].argmax(1)):
            assert error(denoised(model, x, sigma, cond), reference["denoised_class"], x) < 1e-5
        assert error(reference["denoised_class"], reference["denoised"], x) > 1e-3
    t, alpha = time_of(model, sigma)
    expected = (reference["denoised"] - x) / sigma[:, None, None, None] ** 2
    with torch.no_grad():
        assert worst((model.score((alpha * x).float(), t) * alpha).float(), expected) < 1e-5
    if isinstance(model.sde, EDMSDE):  # where the probability flow is dx/dsigma = (x - D) / sigma
        rate = model.sde.sigma_dot(t)[:, None, None, None]
        drift = rate * (x - reference["denoised"]).double() / sigma[:, None, None, None]
        with torch.no_grad():
            assert worst(model.velocity(x, t), drift.float()) < 1e-5


@pytest.mark.skipif(not SHARED.is_dir(), reason="without the reference checkpoints")
@pytest.mark.parametrize("config", [None, "edm", {"precond": "EDMPrecond", "sigma_data": 0.5}], ids=str)
def test_the_official_reference(config):
    """The larger reference, from its folder and as a file: denoised images and scores."""
    reference = torch.load(SHARED / "edm_ddpmpp" / "reference.pt", weights_only=True)
    x, sigma = reference["x"], reference["sigma"]
    for path in (SHARED / "edm_ddpmpp", SHARED / "edm_ddpmpp" / "state.pt"):
        model = load(path, config=config)
        assert error(denoised(model, x, sigma), reference["denoised"], x) < 1e-5
        with torch.no_grad():
            assert worst(model.score(x, time_of(model, sigma)[0]), reference["score"]) < 1e-5


@pytest.mark.parametrize(
    ("config", "sde", "label"),
    [
        ("edm", EDMSDE(), lambda sigma: math.log(sigma) / 4),
        ("ve", VESDE(0.02, 100.0), lambda sigma: math.log(sigma / 2)),
        ("edm-cifar10-32x32-uncond-ve", EDMSDE(), lambda sigma: math.log(sigma) / 4),
        ({"class_name": "training.networks.VEPrecond"}, VESDE(0.02, 100.0), lambda sigma: math.log(sigma / 2)),
        (
            "vp",
            VPSDE(0.1, 20.0, 1e-5),
            lambda s: 999 * (math.sqrt(0.01 + 2 * 19.9 * math.log(1 + s**2)) - 0.1) / 19.9,
        ),
        (
            {"precond": "VPPrecond", "beta_d": 9.0, "beta_min": 1.0, "M": 500},
            VPSDE(1.0, 10.0, 1e-5),
            lambda s: 499 * (math.sqrt(1.0 + 2 * 9.0 * math.log(1 + s**2)) - 1.0) / 9.0,
        ),
        (
            {"init_kwargs": {"sigma_min": 0.01, "sigma_max": 50.0}, "class_name": "x", "precond": "ve"},
            VESDE(0.01, 50.0),
            lambda sigma: math.log(sigma / 2),
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_preconditionings(config, sde, label, tmp_path):
    """Each has the process and the noise label of table 1 of Karras et al. 2022."""
    file, _ = write("edm_ncsnpp", tmp_path, config=False)
    model = load(file, config=config)
    assert model.sde == sde
    for sigma in (0.3, 5.0):
        t = model.sde.time(-2 * torch.tensor(sigma, dtype=torch.float64).log())
        assert float(model.label(model.sde, t)) == pytest.approx(label(sigma), rel=1e-9)


def test_a_table_of_noise_levels(tmp_path):
    """iDDPMPrecond's table u, in descending order with a 0 at its end, gives the discrete process with these levels."""
    betas = torch.linspace(1e-3, 0.2, 40, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    levels = ((1 - bar) / bar).sqrt()
    table = torch.cat([torch.zeros(1, dtype=torch.float64), levels]).flip(0)
    file, reference = write("edm_adm_cond", tmp_path, lambda s: s.update(u=table), config=False)
    model = load(file)
    assert isinstance(model.sde, DiscreteVPSDE)
    torch.testing.assert_close(torch.tensor(model.sde.betas, dtype=torch.float64), betas, rtol=1e-9, atol=1e-12)
    t = torch.arange(40, dtype=torch.float64) / 39
    torch.testing.assert_close(torch.exp(-0.5 * model.sde.log_snr(t)), levels, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.label(model.sde, t), torch.arange(40, dtype=torch.float64))
    assert type(model.sde).__name__ in SDES
    assert denoised(model, reference["x"], reference["sigma"]).isfinite().all()
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match=r"state\.pt lacks the table u"):
        load(write("edm_adm_cond", tmp_path / "plain", config=False)[0], config="iddpm")


def test_more_channels_out_than_in(tmp_path):
    """What a network learns of a variance, in channels after the image's, is left out."""

    def widen(state):
        for kind in ("weight", "bias"):
            value = state[f"model.out_conv.{kind}"]
            state[f"model.out_conv.{kind}"] = torch.cat([value, torch.ones_like(value)])

    _, reference = write("edm_adm_cond", tmp_path, widen)
    x = reference["x"]
    assert error(denoised(load(tmp_path), x, reference["sigma"]), reference["denoised"], x) < 1e-5


@pytest.mark.parametrize("form", ["safetensors", "ema", "net", "bare names"])
def test_other_forms(form, tmp_path):
    """As a safetensors file, under a key, and with the network's names alone: the same denoiser."""
    tensors, _, options, reference = read("edm_ncsnpp")
    path = tmp_path / "model.pt"
    if form == "safetensors":
        path = tmp_path / "network.safetensors"
        save_file(tensors, str(path))
    elif form == "bare names":
        torch.save({k.removeprefix("model."): v for k, v in tensors.items()}, path)
    else:
        torch.save({form: tensors, "step": 3}, path)
    x = reference["x"]
    for config in (None, options):
        assert error(denoised(load(path, config=config), x, reference["sigma"]), reference["denoised"], x) < 1e-5


class VPPrecond(Persistent, nn.Module):
    """A network as a snapshot holds it: its parameters in nested modules, and what it was made with."""

    def __init__(self, tensors, options):
        super().__init__()
        self._init_args, self._init_kwargs = (), EasyDict(**options)
        for name, value in tensors.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            if last in ("resample_filter", "freqs"):
                module.register_buffer(last, value)
            else:
                module.register_parameter(last, nn.Parameter(value))


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_snapshot(as_folder, tmp_path):
    """Of a snapshot's pickle the averaged network is taken; its class says the preconditioning, no configuration is needed."""
    tensors, _, options, reference = read("vp_ddpmpp_cond")
    net = VPPrecond(tensors, options["kwargs"])
    path = written(tmp_path, EasyDict(ema=net, augment_pipe=None, dataset_kwargs=EasyDict(path="x.zip")))
    model = load(tmp_path if as_folder else path)
    assert isinstance(model.sde, VPSDE)
    x, sigma, cond = (reference[k] for k in ("x", "sigma", "class_labels"))
    assert error(denoised(model, x, sigma), reference["denoised"], x) < 1e-5
    assert error(denoised(model, x, sigma, cond), reference["denoised_class"], x) < 1e-5
    for keep in (0, 5, 0.3, 0.999):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
        with pytest.raises(ValueError, match=r"snapshot\.pkl"):
            load(path)
        path.write_bytes(whole)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, 0.2, 0.99])
def test_truncated(keep, tmp_path):
    """Cut off anywhere, the file is named and called damaged."""
    file, _ = write("edm_ncsnpp", tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"state\.pt is not a readable PyTorch file .*truncated or damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.enc.4x4_block0.conv1.bias"), r"missing: enc\.4x4_block0\.conv1\.bias"),
        (lambda s: s.update({"model.enc.4x4_more.weight": torch.zeros(1)}), r"left over: enc\.4x4_more\.weight"),
        (
            lambda s: s.update({"model.enc.4x4_block0.conv1.bias": torch.zeros(3)}),
            r"of another shape: .*\(3,\) where the configuration gives \(16,\)",
        ),
        (lambda s: s.pop("model.map_layer0.weight"), "does not hold a U-Net of EDM|written by another program"),
        (lambda s: s.pop("model.enc.8x8_conv.weight"), "does not hold a U-Net of EDM"),
        (lambda s: s.pop("model.enc.4x4_block0.conv0.weight"), "different numbers of blocks"),
    ],
    ids=["missing", "extra", "shape", "embedding", "entry", "block"],
)
def test_weights_that_do_not_fit(change, message, tmp_path):
    """What is missing, left over or of another shape is named, and the file."""
    file, _ = write("edm_ncsnpp", tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("img_resolution", 16),
        ("img_channels", 1),
        ("label_dim", 10),
        ("num_blocks", 4),
        ("model_type", "DhariwalUNet"),
        ("embedding_type", "positional"),
        ("encoder_type", "skip"),
        ("decoder_type", "skip"),
        ("model_channels", 16),
        ("channel_mult", [2, 2]),
        ("attn_resolutions", [8]),
        ("resample_filter", [1, 1]),
    ],
)
def test_options_that_contradict_the_weights(key, value, tmp_path):
    """The option, what it says and what the weights say are named."""
    file, _ = write("edm_ncsnpp", tmp_path, config=False)
    with pytest.raises(ValueError, match=re.escape(f"the configuration says {key}={value!r}, the weights in {file}")):
        load(file, config={key: value})


def test_options_that_are_not_known(tmp_path):
    """Unknown ones are named in a warning; an unknown preconditioning or name is an error that lists the known ones."""
    file, _ = write("edm_ncsnpp", tmp_path, config=False)
    with pytest.warns(UserWarning, match="not known and were not used: sharpness"):
        load(file, config={"sharpness": 3})
    with pytest.raises(ValueError, match="says embedding_type='positional'"):
        load(file, config="edm-cifar10-32x32-uncond-vp")
    with pytest.raises(ValueError, match="unknown preconditioning 'EDM9'; known are edm, vp, ve, iddpm"):
        load(file, config={"precond": "EDM9"})
    with pytest.raises(ValueError, match=r"'heun' is no configuration of EDM; give its options, .*iddpm"):
        load(file, config="heun")


def test_networks_of_other_kinds(tmp_path):
    """EDM2's names are recognised and another way is pointed out; a folder without a network is no EDM folder."""
    names = ("enc.8x8_block0.emb_gain", "map_layer0.weight", "out_gain")
    torch.save({f"unet.{n}": torch.zeros(1) for n in names}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"looks like one of EDM2.*WrappedNet\.edm"):
        load_edm(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is no state dict of an EDM network"):
        load_edm(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no state\.pt or model\.pt and no \.pkl"):
        load_edm(tmp_path / "empty")
    assert not edm.is_state({"a": torch.zeros(1)})


def test_an_architecture_by_its_name(tmp_path):
    """model_type or arch may say ncsnpp; what it stands for is held against the weights."""
    file, reference = write("edm_ncsnpp", tmp_path)
    (tmp_path / "config.json").unlink()
    for config in ({"arch": "ncsnpp", "precond": "edm"}, {"model_type": "ncsnpp"}, "EDM-NCSN++"):
        assert (
            error(denoised(load(file, config=config), reference["x"], reference["sigma"]), reference["denoised"], 1)
            < 1e-5
        )
    with pytest.raises(ValueError, match="model_type"):
        load(file, config={"arch": "adm"})
