"""Files that `load` cannot or must not take: other programs' checkpoints, and files that ask for more than they hold."""

import json
import random
import resource
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from test_edm import write
from test_score_sde import options_of, publish
from test_store import mlp_model, quantized_model

from scoresde import from_pretrained, load, save_pretrained, store
from scoresde.interop import load_edm, load_score_sde, network_of, read_pickle
from scoresde.interop.edm import snapshot_values
from scoresde.interop.files import read_config, read_torch

# -- other programs' checkpoints --------------------------------------------------------------------------------------


def weights(*names):
    return {name: torch.zeros(2, 2) for name in names}


DDPM_PYTORCH = weights(
    "betas", "alphas_cumprod", "model.init_conv.weight", "model.time_mlp.1.weight", "model.downs.0.0.mlp.1.weight"
)
FILES = {
    "denoising-diffusion-pytorch": (
        dict(
            step=7000,
            model=DDPM_PYTORCH,
            opt=dict(state={}, param_groups=[]),
            ema={"initted": torch.tensor(True), "step": torch.tensor(7000)}
            | {f"{who}.{k}": v for who in ("online_model", "ema_model") for k, v in DDPM_PYTORCH.items()},
            scaler=None,
            version="2.2.5",
        ),
        r"checkpoint of denoising-diffusion-pytorch.*state\['model'\] or state\['ema'\].*WrappedNet\(diffusion\.model, betas=",
    ),
    "k-diffusion": (
        dict(
            config={"model": {"type": "image_v1"}},
            model=weights("inner_model.proj_in.weight", "inner_model.timestep_embed.weight"),
            model_ema=weights("inner_model.proj_in.weight", "inner_model.timestep_embed.weight"),
            opt={},
            epoch=3,
            step=10,
        ),
        r"checkpoint of k-diffusion.*state\['model'\] or state\['model_ema'\].*WrappedNet\.edm\(denoiser",
    ),
    "guided-diffusion": (
        weights("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"),
        r"guided-diffusion.*WrappedNet\(net, betas=",
    ),
    "latent-diffusion": (
        {"state_dict": weights("model.diffusion_model.input_blocks.0.0.weight", "betas"), "global_step": 3},
        r"latent diffusion.*state\['state_dict'\]",
    ),
    "edm2": (weights("unet.emb_fourier.freqs", "unet.emb_noise.weight"), r"network of EDM2.*WrappedNet\.edm"),
    "plain training state": (
        dict(model=weights("enter.weight", "leave.weight"), optimizer=dict(state={}), step=100),
        r"state of a training .*state\['model'\].*enter\.weight.*\['model'\]\), and use WrappedNet\(net, sde",
    ),
    "with an average of its own": (
        dict(model=weights("a.weight"), ema=weights("a.weight"), optimizer=dict(state={}), step=100),
        r"state of a training .*state\['model'\] or state\['ema'\]",
    ),
    "state dict": (
        weights("a.weight", "b.weight"),
        r"a state dict whose network is not known here.*weights_only=True\)\), and",
    ),
    "numbers": (dict(loss=[1.0, 2.0], step=3), r"no set of weights \(with the entries loss, step\).*state_dict\(\)"),
    "a list": ([torch.zeros(2)], r"no set of weights \(list\)"),
}


@pytest.mark.parametrize("name", ["checkpoint_9.pth", "model-7.pt"])
@pytest.mark.parametrize("kind", FILES)
def test_what_users_of_other_programs_bring(kind, name, tmp_path):
    """Each is called what it is, with what to do, whatever its name; never is it taken for score_sde's."""
    content, message = FILES[kind]
    torch.save(content, tmp_path / name)
    for path in (tmp_path / name, tmp_path) if name.startswith("checkpoint_") else (tmp_path / name,):
        with pytest.raises(ValueError, match=rf"{name} was written by another program and is .*{message}") as error:
            load(path)
        assert "WrappedNet" in str(error.value) or kind in ("numbers", "a list")
    with pytest.raises(ValueError, match="another program"):
        load_score_sde(tmp_path / name, "vp/cifar10_ddpmpp_continuous")


def test_the_advice_for_a_training_state_works(tmp_path):
    """A network of one's own, loaded as the error says, samples."""
    from scoresde import VPSDE, WrappedNet, sample
    from scoresde.nets import MLP

    net = MLP(2)
    torch.save(dict(model=net.state_dict(), optimizer={}, step=1), tmp_path / "x.pt")
    again = MLP(2)
    again.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True)["model"])
    assert sample(WrappedNet(again, VPSDE(), predicts="noise"), (3, 2), method="ddim", steps=3, seed=0).shape == (3, 2)


# -- more than they hold ----------------------------------------------------------------------------------------------


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # MB


def refused(function, match, memory=300, seconds=20):
    before, start = peak(), time.monotonic()
    with pytest.raises(ValueError, match=match):
        function()
    assert peak() - before < memory
    assert time.monotonic() - start < seconds


def packed(source, target, *, deflate=True):
    """The same archive, compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED if deflate else 0) as new:
        for entry in old.infolist():
            with old.open(entry) as a, new.open(entry.filename, "w") as b:
                while chunk := a.read(2**20):
                    b.write(chunk)


def test_an_archive_that_unpacks_to_gigabytes(tmp_path):
    """Tensors of zeros, deflated: refused without being unpacked, by every loader of such files."""
    torch.save({"model": {"all_modules.0.weight": torch.zeros(2**27)}, "ema": {}}, tmp_path / "plain.pth")
    packed(tmp_path / "plain.pth", tmp_path / "checkpoint_1.pth")
    (tmp_path / "plain.pth").unlink()
    assert (tmp_path / "checkpoint_1.pth").stat().st_size < 10**6
    for function in (load, load_score_sde, load_edm, read_torch):
        refused(
            lambda f=function: f(tmp_path / "checkpoint_1.pth"), r"checkpoint_1\.pth has .* bytes and unpacks to 536,"
        )


def test_entries_that_overlap(tmp_path):
    """An archive whose directory names the same bytes many times promises more than it has."""
    torch.save({"w": torch.zeros(10**5)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("data/0"))
        for i in range(1, 50):
            again = zipfile.ZipInfo(entry.filename[:-1] + str(i))
            for name in ("header_offset", "compress_size", "file_size", "CRC"):
                setattr(again, name, getattr(entry, name))
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    refused(lambda: read_torch(tmp_path / "x.pth"), "unpacks to 2")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**5, 10**5), torch.zeros(3, 1).expand(3, 10**9), torch.empty(10**6, 10**4, device="meta")],
    ids=range(3),
)
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_larger_than_their_memory(tensor, zipped, tmp_path):
    """A stride of 0, or no memory at all, inside a small file."""
    state = dict(model={"all_modules.0.weight": tensor}, ema=dict(shadow_params=[tensor]), step=1)
    torch.save(state, tmp_path / "checkpoint_1.pth", _use_new_zipfile_serialization=zipped)
    for function in (load, load_edm, lambda p: load_score_sde(p, "vp/cifar10_ddpmpp_continuous")):
        refused(lambda f=function: f(tmp_path / "checkpoint_1.pth"), r"checkpoint_1\.pth holds a tensor of shape")


def test_many_tensors_on_one_memory(tmp_path):
    """Each fits what it stands on, all together would not."""
    base = torch.zeros(2**18)
    torch.save([base.view(-1) for _ in range(1000)], tmp_path / "x.pth")
    refused(lambda: read_torch(tmp_path / "x.pth"), "stands on less memory")


class Bytes:
    """Unpickled, 10 GB of zeros."""

    def __reduce__(self):
        return bytearray, (10**10,)


@pytest.mark.parametrize("zipped", [True, False])
def test_memory_out_of_a_number(zipped, tmp_path):
    """What a restricted pickle may still call could take any memory; the one such call is refused unseen."""
    torch.save({"model": Bytes()}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    refused(lambda: load(tmp_path / "x.pth"), r"x\.pth holds more than tensors and was refused: a bytearray")


def test_sizes_that_a_pickle_makes_up(tmp_path):
    """A storage that claims more entries than the archive holds is no way to read other memory."""
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.count(b"M\xe8\x03") == 2  # 1000: of the storage and of the shape
                content = content.replace(b"M\xe8\x03", b"J\x00\x00\x00\x40")
            new.writestr(entry.filename, content)
    refused(lambda: read_torch(tmp_path / "y.pth"), r"y\.pth")


def test_snapshots_with_strides_of_zero():
    """A tensor of a snapshot may not have more entries than its memory."""
    storage = snapshot_values._Storage(torch.float32, torch.zeros(4).untyped_storage())
    args = (storage, 0, (10**6, 10**6), (0, 0), False, {})
    with pytest.raises(snapshot_values.RefusedError, match="more entries"):
        snapshot_values._tensor(args)
    assert snapshot_values._tensor((storage, 0, (2, 2), (2, 1), False, {})).shape == (2, 2)


def laughs(levels):
    """A YAML text of a few hundred bytes that stands for 9^levels words."""
    lines = ["a0: &a0 lol"]
    for i in range(levels):
        lines.append(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True])
def test_yaml_aliases(merge, tmp_path):
    """Aliases, by which nodes multiply, are refused where the file is named; a file without them is read."""
    text = laughs(9)
    if merge:
        text = "\n".join(["a0: &a0 {x: 1}", *(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}, *a{i}]}}" for i in range(30))])
    (tmp_path / "x.yaml").write_text(text)
    refused(lambda: read_config(tmp_path / "x.yaml"), r"x\.yaml is not a readable configuration: it has aliases")
    (tmp_path / "y.yml").write_text("model: {name: ddpm, ch_mult: [1, 2]}\n")
    assert read_config(tmp_path / "y.yml") == {"model": {"name": "ddpm", "ch_mult": [1, 2]}}


def test_configurations_without_end(tmp_path):
    """Of more bytes than any has, or nested without end."""
    with open(tmp_path / "x.json", "wb") as f:
        f.seek(2**34)
        f.write(b"}")
    refused(lambda: read_config(tmp_path / "x.json"), r"x\.json is no configuration: it has more than 16 MiB")
    for suffix in ("json", "yaml"):
        (tmp_path / f"y.{suffix}").write_text("[" * 100_000)
        refused(lambda s=suffix: read_config(tmp_path / f"y.{s}"), r"y\..* is not a readable configuration")


@pytest.mark.parametrize(
    "model",
    [
        dict(num_res_blocks=10**6),
        dict(ch_mult=(20_000, 1)),
        dict(num_scales=10**8),
        dict(num_scales=1e308),
        dict(nf="x"),
        dict(ch_mult=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["vp_ddpm_discrete", "ve_ncsnpp"])
def test_options_of_score_sde_of_absurd_size(name, model, tmp_path):
    """Refused before memory is taken; the error names the file."""
    file, _ = publish(name, tmp_path, options=options_of(name, **model))
    if "num_scales" in model and name == "ve_ncsnpp":
        pytest.skip("a continuous schedule has no steps")
    refused(lambda: load(tmp_path), rf"{file.name}")


def test_a_header_that_lies(tmp_path):
    """A safetensors file whose header promises more than the file holds."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    refused(lambda: load(tmp_path), r"model\.safetensors is not a readable")
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + header)
    refused(lambda: load(tmp_path), r"model\.safetensors is not a readable")


# -- random states -----------------------------------------------------------------------------------------------------


def everything(tmp_path):
    """(name, call) for each loader."""
    save_pretrained(mlp_model(), tmp_path / "mlp")
    save_pretrained(quantized_model(), tmp_path / "quantized")
    yield "load", lambda: load(tmp_path / "mlp")
    yield "load_model", lambda: store.load_model(tmp_path / "quantized")
    yield "from_pretrained", lambda: from_pretrained(tmp_path / "mlp")
    file, _ = publish("subvp_ddpmpp", tmp_path / "score_sde")
    yield "load_score_sde", lambda: load_score_sde(file)
    from test_ncsn import read as read_ncsn

    tensors, _, options, _ = read_ncsn("v1")
    (tmp_path / "ncsn").mkdir()
    torch.save(dict(optimizer={}, model=tensors, ema={}, step=1), tmp_path / "ncsn" / "checkpoint_0.pth")
    yield "ncsn", lambda: load_score_sde(tmp_path / "ncsn", options, ema=False)
    (tmp_path / "edm").mkdir()
    state, _ = write("edm_ncsnpp", tmp_path / "edm")
    yield "load_edm", lambda: load_edm(state)
    from test_pickles import EDMPrecond, written

    snapshot = written(tmp_path, {"ema": EDMPrecond()})
    yield "read_pickle", lambda: (read_pickle(snapshot), network_of(snapshot))
    try:
        import diffusers
    except ImportError:
        return
    from test_diffusers import DDPM, save, unet

    pipeline = save(unet(DDPM), tmp_path / "pipeline")
    yield "load_diffusers", lambda: load(pipeline)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=3,
        norm_type="ada_norm_zero",
    )
    dit = save(dit, tmp_path / "dit", place="transformer")
    yield "dit", lambda: load(dit)


def test_no_loader_touches_random_states(tmp_path):
    """torch, NumPy and Python draw afterwards what they would have drawn before, from whatever state."""
    calls = dict(everything(tmp_path))
    assert len(calls) >= 7
    for name, call in calls.items():
        for seed in (0, 1):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
            assert torch.equal(torch.get_rng_state(), before[0]), name
            assert np.random.get_state()[1].tolist() == before[1], name
            assert random.getstate() == before[2], name


def test_what_is_read_is_independent_of_the_file(tmp_path):
    """A loaded model does not change when its file is overwritten: nothing of it is a view of the file."""
    file, _ = publish("subvp_ddpmpp", tmp_path)
    model = load(file)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with open(file, "r+b") as f:
        f.write(b"\xff" * file.stat().st_size)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
