"""What `load` takes a path for, the hub without a network, files with code in them, and foreign files on the command line."""

import json
import pickle
import re
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_cli import call, fails
from test_edm import write
from test_score_sde import publish, read, same
from test_store import Bomb, assert_same_model, edited, mlp_model, quantized_model, shaken, unet_model

from scoresde import VPSDE, CosineSDE, NoiseLabel, ScoreNet, from_pretrained, load, push_to_hub, save_pretrained, store
from scoresde.interop import load_diffusers, load_edm, load_score_sde
from scoresde.interop.ours import hub
from scoresde.nets import DiT, LeanUNet, UNet


def published_unet():
    """A `UNet` under VP with the noise label of a network trained on step numbers."""
    torch.manual_seed(0)
    net = UNet(1, 1, (8, 8), width=8, multipliers=(1, 2), blocks=1, attention=(4,), group_channels=2)
    return shaken(ScoreNet(net, VPSDE(), "noise", label=NoiseLabel("time", 999.0), event_shape=(1, 8, 8), levels=256))


def transformer():
    """A `DiT` on v-prediction, with a label in the log of sigma."""
    torch.manual_seed(0)
    net = DiT(2, 2, (4, 4), patch=2, width=16, depth=1, heads=2, classes=3)
    label = NoiseLabel("log_sigma", 0.25, 0.1)
    return shaken(ScoreNet(net, CosineSDE(), "v_prediction", label=label, event_shape=(2, 4, 4)))


MODELS = {
    "UNet": published_unet,
    "LeanUNet": unet_model,
    "DiT": transformer,
    "MLP": lambda: mlp_model(label=NoiseLabel("sigma", 2.0, -1.0)),
    "quantized": quantized_model,
}


# -- recognition -----------------------------------------------------------------------------------------------------


def test_score_sde_by_what_a_file_holds(tmp_path):
    """A checkpoint of theirs under any name; in a folder by its own name, even beside files of other kinds."""
    file, _ = publish("ve_ncsnpp", tmp_path / "a")
    model = load_score_sde(file)
    for name in ("checkpoint_8.pth", "weights.pt", "x.ckpt", "y.bin", "z.tar", "bare", "w.pkl"):
        (tmp_path / "a" / name).write_bytes(file.read_bytes())
        assert same(load(tmp_path / "a" / name), model)
    write("edm_ncsnpp", tmp_path / "a", config=False)
    assert same(load(tmp_path / "a"), model)
    assert same(load(str(tmp_path / "a")), model)


def test_edm_by_its_names(tmp_path):
    """A state dict of theirs under any name, as safetensors too, and a folder with one."""
    file, _ = write("edm_ncsnpp", tmp_path)
    model = load_edm(file)
    save_file(read("edm_ncsnpp")[0], str(tmp_path / "x.safetensors"))
    for name in ("y.pth", "z.ckpt", "bare", "w.pkl"):
        (tmp_path / name).write_bytes(file.read_bytes())
    for name in ("state.pt", "x.safetensors", "y.pth", "z.ckpt", "bare"):
        assert same(load(tmp_path / name), model)
    assert same(load(tmp_path), model)


def test_a_file_of_torch_under_the_name_of_a_snapshot(tmp_path):
    """A state dict saved by torch as `network.pkl` is read as what it is."""
    file, _ = write("edm_ncsnpp", tmp_path)
    model = load_edm(file)
    file.rename(tmp_path / "network.pkl")
    assert same(load(tmp_path / "network.pkl"), model)


def test_diffusers_by_its_options(tmp_path):
    """A pipeline's folder, its network's folder, and the network's file of either kind."""
    pytest.importorskip("diffusers")
    from test_diffusers import DDPM, save, unet

    for safe in (True, False):
        folder = save(unet(DDPM), tmp_path / str(safe), safe=safe)
        model = load_diffusers(folder)
        assert same(load(folder), model)
        assert same(load(folder / "unet"), model)
        (file,) = (p for p in (folder / "unet").iterdir() if p.suffix != ".json")
        assert same(load(file), model)


def test_ours_come_first(tmp_path):
    """A folder with a model of this package is that, whatever else lies in it; its options are its own."""
    publish("ve_ncsnpp", tmp_path)
    write("edm_ncsnpp", tmp_path, config=False)
    (tmp_path / "model_index.json").write_text("{}")
    save_pretrained(mlp_model(), tmp_path / "model")
    assert_same_model(load(tmp_path), mlp_model())
    with pytest.raises(ValueError, match="carries its own"):
        load(tmp_path, config={"sde": "vpsde"})


def test_what_is_none_of_these(tmp_path):
    """Other programs' files, an empty folder and names of nothing: the errors say what is known, and what to do."""
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    for name in ("other.pt", "other.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} was written by another program .*WrappedNet"):
            load(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no scoresde model.*Nor is it .*It is empty"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "model-10.pt").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"In it are model-10\.pt; give the file that you mean"):
        load(tmp_path / "empty")
    for name in ("nothing", "a/b/c", "/no/where", "../x.pt"):
        with pytest.raises(FileNotFoundError, match=rf"there is no file or folder {re.escape(name)}; give a model's"):
            load(name)


# -- code in files ---------------------------------------------------------------------------------------------------

PLACES = {
    "score_sde": ("checkpoint_0.pth", lambda d: load_score_sde(d, {})),
    "edm": ("state.pt", load_edm),
    "snapshot": ("network.pkl", load_edm),
    "diffusers": ("diffusion_pytorch_model.bin", lambda d: load_diffusers(d, {})),
}


@pytest.mark.parametrize("direct", [True, False], ids=["loader", "load"])
@pytest.mark.parametrize("writer", ["pickle", "torch", "legacy"])
@pytest.mark.parametrize("kind", PLACES)
def test_code_is_refused(kind, writer, direct, tmp_path):
    """A pickle with code, in every kind of file: an error that names the file, and the code has not run."""
    name, loader = PLACES[kind]
    target = tmp_path / "owned"
    bomb = {"model": {"module.all_modules.0.weight": torch.zeros(2)}, "ema": {}, "bomb": Bomb(str(target))}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"} if kind == "diffusers" else {}))
    if writer == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, tmp_path / name, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ValueError, match=r"refused|executed|not allowed|damaged|not a readable") as caught:
        loader(tmp_path) if direct else load(tmp_path if kind == "diffusers" else tmp_path / name)
    assert name in str(caught.value)
    assert not target.exists()


def test_numbers_of_numpy(tmp_path):
    """The float64 scalar of their optimizer states is read; arrays, generators and other types of NumPy are refused."""

    def change(value):
        return lambda s: s["optimizer"].update(more=value)

    publish("ve_ncsnpp_discrete", tmp_path / "fine", change(np.float64(0.5)))
    load(tmp_path / "fine")
    for i, value in enumerate((np.zeros(2), np.random.default_rng(0), np.float32(0.5), np.frombuffer)):
        file, _ = publish("ve_ncsnpp_discrete", tmp_path / str(i), change(value))
        with pytest.raises(
            ValueError, match=r"holds more than tensors and was refused; nothing in it was exec"
        ) as caught:
            load(tmp_path / str(i))
        assert str(file) in str(caught.value)
        assert "Re-running" not in str(caught.value)


@pytest.mark.parametrize("content", [b"P", b"PK\x03", b"<html>404</html>", b"weights " * 40, b"\x80\x02", b"\x80\x05."])
def test_what_never_was_a_checkpoint(content, tmp_path):
    """A page or a few bytes under a checkpoint's name are called unreadable, not dangerous."""
    (tmp_path / "checkpoint_0.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint_0\.pth is not a readable PyTorch file") as caught:
        load(tmp_path / "checkpoint_0.pth")
    assert "weights_only" not in str(caught.value)


def test_truncated_files_of_old_versions_of_torch(tmp_path):
    """Cut off anywhere, a file that is not zipped is called damaged too."""
    torch.save({"a": torch.zeros(100)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pth").read_bytes()
    for keep in (5, 30, 45, 60, 100, 200, 300, len(whole) - 10):
        (tmp_path / "x.pth").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"x\.pth is not a readable PyTorch file .*truncated or damaged"):
            load(tmp_path / "x.pth")


# -- the hub, without a network --------------------------------------------------------------------------------------


def test_wanted_files():
    """Options, and weights as safetensors or, where there are none, as `.bin`; no half precision, images or code."""
    pipeline = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
    both = [f"unet/diffusion_pytorch_model.{s}" for s in ("safetensors", "bin")]
    rest = ["README.md", "x.py", "vae/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "a/b/config.json"]
    rest += ["unet/diffusion_pytorch_model.non_ema.safetensors", "images/1.png", "pytorch_model.bin", ".gitattributes"]
    assert hub.wanted_files(pipeline + both + rest) == pipeline + both[:1]
    assert hub.wanted_files(pipeline + both[1:] + rest) == pipeline + both[1:]
    flat = ["config.json", "scheduler_config.json", "diffusion_pytorch_model.bin"]
    assert hub.wanted_files(flat) == flat
    ours = ["config.json", "model.safetensors"]
    assert hub.wanted_files([*ours, "notes.txt"]) == ours
    half = ["unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert hub.wanted_files([*half, "unet/diffusion_pytorch_model.fp16.bin"]) == half
    parts = [f"unet/diffusion_pytorch_model{s}" for s in ("-00001-of-00002.safetensors", "-00002-of-00002.safetensors")]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert hub.wanted_files([*parts, index, *half, "unet/diffusion_pytorch_model.bin"]) == [*parts, index, half[0]]


class Hub:
    """A hub in a folder: what its functions were called with is kept."""

    def __init__(self, folder, monkeypatch, *, online=True):
        self.folder, self.online, self.calls = folder, online, []
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: self.calls.append(("token", token)) or self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def list_repo_files(self, repo_id, revision=None):
        if not self.online:
            raise ConnectionError(f"no route to {repo_id}\nand much more")
        return [str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()]

    def snapshot_download(self, repo_id, revision=None, allow_patterns=None, local_files_only=False):
        self.calls.append((repo_id, revision, allow_patterns, local_files_only))
        if local_files_only and not self.folder.exists():
            raise FileNotFoundError("not in the cache")
        return str(self.folder)

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, commit_message))
        self.folder.mkdir(parents=True)
        for file in Path(folder_path).iterdir():
            (self.folder / file.name).write_bytes(file.read_bytes())
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.mark.parametrize("kind", MODELS)
def test_up_and_down(kind, tmp_path, monkeypatch):
    """A model that was saved or pushed comes back with the same outputs to the bit, by function and by method."""
    model = MODELS[kind]()
    assert save_pretrained(model, tmp_path / "a") == tmp_path / "a"
    assert model.save_pretrained(tmp_path / "b") == tmp_path / "b"
    for loaded in (from_pretrained(tmp_path / "a"), ScoreNet.from_pretrained(tmp_path / "b"), load(tmp_path / "a")):
        assert_same_model(loaded, model)
        assert getattr(loaded, "label", None) == getattr(model, "label", None)
    online = Hub(tmp_path / "hub", monkeypatch)
    address = model.push_to_hub("me/model", private=True, token="t", commit_message="first")
    assert address == "https://hub/me/model/commit/1"
    assert online.calls == [("token", "t"), ("create", "me/model", True, True), ("upload", "me/model", "first")]
    assert sorted(p.name for p in online.folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_model(from_pretrained("me/model", revision="v1"), model)
    assert online.calls[-1] == ("me/model", "v1", online.calls[-1][2], False)
    assert sorted(online.calls[-1][2]) == ["config.json", "model.safetensors"]
    assert_same_model(load("me/model"), model)


def test_a_pipeline_on_the_hub(tmp_path, monkeypatch):
    """Of a pipeline only the network and the scheduler's options are asked for; `load` takes it for what it is."""
    pytest.importorskip("diffusers")
    from test_diffusers import DDPM, save, unet

    folder = save(unet(DDPM), tmp_path / "repo")
    (folder / "vae").mkdir()
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    online = Hub(folder, monkeypatch)
    assert same(load("google/ddpm-cifar10-32"), load_diffusers(folder))
    assert not [name for name in online.calls[-1][2] if "vae" in name]


def test_without_a_network(tmp_path, monkeypatch):
    """What was downloaded before is used; else the error says so in one line. Names of another form are never asked for."""
    model = mlp_model()
    save_pretrained(model, tmp_path / "cache")
    offline = Hub(tmp_path / "cache", monkeypatch, online=False)
    assert_same_model(load("me/model"), model)
    assert offline.calls[-1][3] is True
    offline.folder = tmp_path / "nothing"
    message = (
        r"no file or folder me/model, and it could not be had from the hub .*ConnectionError: no route to me/model\)"
    )
    for function in (load, from_pretrained):
        with pytest.raises(FileNotFoundError, match=message):
            function("me/model")
    offline.calls.clear()
    with pytest.raises(FileNotFoundError):
        load("./me/model")
    with pytest.raises(ValueError, match="repo_id must have the form 'owner/name'"):
        push_to_hub(model, "model")
    with pytest.raises(TypeError, match="Linear"):
        push_to_hub(ScoreNet(torch.nn.Linear(2, 2), VPSDE()), "me/model")
    assert not [c for c in offline.calls if c[0] in ("create", "upload")]


def test_older_and_newer_formats(tmp_path):
    """Format 1, where the lean U-Net was "UNet" and there were no labels, loads; a newer one asks for an upgrade."""
    model = unet_model()
    file = save_pretrained(model, tmp_path) / "model.safetensors"

    def old(header):
        options = dict(header["model"]["options"])
        net, sde, _ = options.pop("net"), options.pop("sde"), options.pop("label")
        model = header["model"] | {"options": {k: v for k, v in options.items() if v is not None}}
        return header | {"format": 1, "net": net | {"name": "UNet"}, "sde": sde, "model": model}

    edited(file, lambda t: None, old)
    loaded = load(tmp_path)
    assert type(loaded.net) is LeanUNet
    assert_same_model(loaded, model)
    edited(file, lambda t: None, lambda h: h | {"format": store.FORMAT + 1, "version": "9.1"})
    for function in (load, from_pretrained):
        with pytest.raises(ValueError, match=rf"scoresde 9\.1 \(format {store.FORMAT + 1}\).*Upgrade scoresde"):
            function(tmp_path)


# -- the command line ------------------------------------------------------------------------------------------------


def test_commands_on_a_published_checkpoint(tmp_path, capsys):
    """sample, bpd, convert and info work on a checkpoint as it was published; what was converted samples the same."""

    def smooth(state):  # a last layer near 0, whose flow is quickly followed
        for value in state["ema"]["shadow_params"][-2:]:
            value.mul_(0.01)

    file, _ = publish("subvp_ddpmpp", tmp_path / "theirs", smooth, options=False)
    options = tmp_path / "options.json"
    options.write_text(json.dumps(read("subvp_ddpmpp")[2]))
    few = ("--n", 2, "--method", "auto", "--nfe", 4)
    code, out, err = call(capsys, "sample", file, "--config", options, "--out", tmp_path / "s", *few)
    assert code == 0, err
    images = np.load(tmp_path / "s" / "samples.npz")["images"]
    assert (images.shape, images.dtype) == ((2, 3, 8, 8), np.uint8)
    code, out, err = call(capsys, "convert", file, tmp_path / "ours", "--config", options)
    assert code == 0, err
    assert same(load(tmp_path / "ours"), load(file, config=options))
    assert call(capsys, "sample", tmp_path / "ours", "--out", tmp_path / "again", *few)[0] == 0
    assert np.array_equal(np.load(tmp_path / "again" / "samples.npz")["images"], images)
    assert "holds a model already" in fails(capsys, "convert", file, tmp_path / "ours", "--config", options)
    np.savez(tmp_path / "data.npz", images=images)
    cheap = ("--limit", 1, "--probes", 2, "--rtol", 1e-1, "--levels", 256, "--data", tmp_path / "data.npz")
    code, out, err = call(capsys, "bpd", tmp_path / "theirs", "--config", options, *cheap, "--out", tmp_path / "bpd")
    assert code == 0, err
    assert np.isfinite(json.loads((tmp_path / "bpd" / "result.json").read_text())["bits_per_dim"])
    code, out, err = call(capsys, "info", "--model", file, "--config", options)
    assert code == 0, err
    assert '"name": "SubVPSDE"' in out
    assert f"parameters: {sum(p.numel() for p in load(tmp_path / 'ours').parameters()):,}" in out
    assert "give config=" in fails(capsys, "info", "--model", file)
    assert "published name" in fails(capsys, "info", "--model", file, "--config", "vp/nothing")
