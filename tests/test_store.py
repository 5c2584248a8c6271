"""Model files: round trips, damaged and foreign files, and what a crash in the middle of a save leaves behind."""

import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scoresde import EDMSDE, VESDE, VPSDE, CosineSDE, QuantizedScoreNet, RectifiedFlow, ScoreNet, SubVPSDE, load, store
from scoresde.nets import MLP, LeanUNet

SMALL = dict(channels=(4, 8), blocks=(1, 1), embedding=8, positions=2)


def shaken(model, seed=1):
    """All parameters moved away from their zero starts."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g).to(p.dtype))
    return model.eval()


def mlp_model(sde=None, parameterization="edm", **options):
    torch.manual_seed(0)
    net = MLP(3, width=8, depth=1, embedding=4)
    return shaken(ScoreNet(net, VPSDE() if sde is None else sde, parameterization, **options))


def quantized_model(sde=None, shape=(1, 4, 4), levels=5, **options):
    torch.manual_seed(0)
    c, *size = shape
    net = LeanUNet(QuantizedScoreNet.input_channels(c), levels * c, size, cond_dim=2, dropout=0.1, **SMALL)
    sde = CosineSDE(-10.0, 16.0) if sde is None else sde
    return shaken(QuantizedScoreNet(net, sde, levels, event_shape=shape, **options))


def unet_model(shape=(2, 4, 4)):
    torch.manual_seed(0)
    net = LeanUNet(shape[0], shape[0], shape[1:], **SMALL)
    return shaken(ScoreNet(net, EDMSDE(0.01, 30.0, rho=5.0), "noise", sigma_data=0.3, levels=7, value_range=(0, 1)))


KINDS = {
    **{f"mlp-{p}": (lambda p=p: mlp_model(parameterization=p)) for p in ("noise", "score", "denoise", "velocity")},
    **{
        f"mlp-{type(s).__name__}": (lambda s=s: mlp_model(s, sigma_data=0.4, event_shape=(3,)))
        for s in (VPSDE(0.2, 15.0, t_min=1e-3), SubVPSDE(), VESDE(0.02, 9.0), RectifiedFlow(t_max=0.99))
    },
    "unet": unet_model,
    "unet-3D": lambda: unet_model((1, 2, 2, 2)),
    "quantized": lambda: quantized_model(sigma_data=0.75, label_range=(-5.0, 6.0), value_range=(-2.0, 1.0)),
    "quantized-1D": lambda: quantized_model(shape=(2, 4), levels=3),
}


def assert_same_model(a, b):
    """Outputs equal to the bit, and the attributes that are not in the outputs."""
    shape = b.event_shape or ((b.net.config["dim"],) if isinstance(b.net, MLP) else None)
    if shape is None:
        shape = (b.net.config["in_channels"], *b.net.config["size"])
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.01, 0.4, 0.9], dtype=torch.float64)
    with torch.no_grad():
        for got, expected in zip(a.predict(x, t), b.predict(x, t), strict=True):
            assert torch.equal(got, expected)
    assert type(a) is type(b)
    assert a.sde == b.sde
    for name in ("sigma_data", "event_shape", "levels", "value_range"):
        assert getattr(a, name) == getattr(b, name)
    assert a.net.config == b.net.config or json.dumps(a.net.config) == json.dumps(b.net.config)


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    """A model that was saved and loaded gives the same numbers to the bit, ready for use, from the folder or file."""
    model = KINDS[kind]()
    assert store.save_model(model, tmp_path / "deep" / "model") == tmp_path / "deep" / "model"
    for path in (tmp_path / "deep" / "model", str(tmp_path / "deep" / "model" / "model.safetensors")):
        loaded = load(path)
        assert not loaded.training
        assert_same_model(loaded, model)
    assert (
        json.loads((tmp_path / "deep" / "model" / "config.json").read_text())["model"]["name"] == type(model).__name__
    )


def test_the_file_alone_is_enough(tmp_path):
    """The safetensors file carries its configuration: moved away from its folder and renamed, it still loads."""
    model = quantized_model()
    store.save_model(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert_same_model(load(tmp_path / "elsewhere.safetensors"), model)


def test_a_float64_model_keeps_its_digits(tmp_path):
    """The weights that come back are the ones that were saved, not a float32 copy of them."""
    model = shaken(mlp_model().double())
    store.save_model(model, tmp_path)
    loaded = load(tmp_path)
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    for k, v in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[k], v), k


def test_channels_last_weights(tmp_path):
    """The memory format of training is no obstacle to saving."""
    model = unet_model().to(memory_format=torch.channels_last)
    store.save_model(model, tmp_path)
    assert_same_model(load(tmp_path).to(memory_format=torch.channels_last), model)


def test_a_run_folder(tmp_path):
    """The finished model is preferred; before there is one, the newest checkpoint that can be read."""
    old, new, final = (shaken(mlp_model(), seed) for seed in (5, 6, 7))
    store.save_model(old, tmp_path / "checkpoints" / "step-00000010")
    store.save_model(new, tmp_path / "checkpoints" / "step-00000020")
    (tmp_path / "checkpoints" / "step-00000030").mkdir()
    assert_same_model(load(tmp_path), new)
    truncate(tmp_path / "checkpoints" / "step-00000020" / "model.safetensors")
    assert_same_model(load(tmp_path), old)
    store.save_model(final, tmp_path / "model")
    assert_same_model(load(tmp_path), final)


def test_an_unfinished_checkpoint_is_not_taken(tmp_path):
    """A folder step-*.tmp is what a crash left behind, however complete its model looks."""
    store.save_model(mlp_model(), tmp_path / "checkpoints" / "step-00000010")
    store.save_model(shaken(mlp_model(), 9), tmp_path / "checkpoints" / "step-00000020.tmp")
    assert_same_model(load(tmp_path), mlp_model())


# -- damaged, foreign and missing ------------------------------------------------------------------------------------


def truncate(path, keep=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
def test_truncated(tmp_path, keep):
    """Cut off anywhere, the error names the file and says that it is damaged."""
    store.save_model(mlp_model(), tmp_path)
    truncate(tmp_path / "model.safetensors", keep)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file.*damaged"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"garbage" * 100, b"\xff" * 4096, b"{}", b"PK\x03\x04" + bytes(64)], ids=range(4))
def test_garbage(tmp_path, content):
    """Bytes that never were a model are no crash either, nor do they ask for 2^63 bytes of memory."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(tmp_path)


def edited(path, change, header=None):
    """Rewrite a model file with changed tensors or header."""
    tensors, config = store.read_tensors(path)
    change(tensors)
    store.write_tensors(path, tensors, config if header is None else header(config))


def part(name, value):
    """A change to a header: another description of one of the model's parts."""
    return lambda c: c | {"model": c["model"] | {"options": c["model"]["options"] | {name: value}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.zeros(1)), "not in the model: extra"),
        (lambda t: t.pop("net.leave.weight"), r"missing: net\.leave\.weight"),
        (lambda t: t.update({"net.leave.bias": torch.zeros(9)}), r"net\.leave\.bias: file \(9,\), model \(3,\)"),
        (
            lambda t: t.update({"net.left.bias": t.pop("net.leave.bias")}),
            r"missing: net\.leave\.bias; not in the model",
        ),
    ],
    ids=["extra", "missing", "misshapen", "renamed"],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    """Each way of not fitting is reported by name and shape, with the file; nothing is broadcast or skipped."""
    store.save_model(mlp_model(), tmp_path)
    edited(tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_a_safetensors_file_of_another_program(tmp_path):
    """Without our header it is refused as foreign, not as damaged."""
    save_file({"w": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="written by another program"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (lambda c: c | {"format": 99, "version": "7.0"}, r"scoresde 7\.0 \(format 99\).*Upgrade"),
        (lambda c: {k: v for k, v in c.items() if k != "model"}, "does not describe a scoresde model"),
        (part("net", None), "do not fit|does not describe"),
        (
            part("net", {"name": "os.system", "options": {}}),
            r"does not describe a scoresde model.*'os\.system' is no class",
        ),
        (part("net", {"name": "VPSDE", "options": {}}), "do not fit|does not describe"),
        (part("sde", {"name": "VPSDE", "options": {"beta": 3}}), "does not describe a scoresde model"),
        (part("sde", {"name": "VPSDE", "options": {"beta_min": -1.0}}), "beta_min"),
        (part("sigma_data", {"$lambda": "1"}), r"sigma_data holds an unknown '\$lambda'"),
        (part("sigma_data", {"$tensor": "option:x"}), "tensor of the option sigma_data is missing"),
        (part("sigma_data", {"$numpy": ["O", 1]}), "no type of a number"),
        (part("sigma_data", math.nan), "sigma_data"),
        (part("event_shape", {"$dict": 3}), "does not describe a scoresde model"),
        (lambda c: c | {"model": {"name": "MLP", "options": {"dim": 3}}}, "do not fit|no scoresde model"),
        (lambda c: c | {"model": {"name": ["MLP"], "options": {"dim": 3}}}, "does not describe a scoresde model"),
        (lambda c: [c], "does not describe a scoresde model"),
        (lambda c: {}, "does not describe a scoresde model"),
        (lambda c: None, "does not describe a scoresde model"),
    ],
    ids=range(17),
)
def test_headers_that_cannot_be_used(tmp_path, header, message):
    """A newer format asks for an upgrade; anything else names what does not fit. Names are looked up, not run."""
    store.save_model(mlp_model(), tmp_path)
    edited(tmp_path / "model.safetensors", lambda t: None, header)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_missing(tmp_path):
    """No such path, and a folder without a model: both errors say where was looked."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no scoresde model.*checkpoints"):
        load(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="not a readable safetensors file"):
        load(tmp_path)


def test_config_is_for_other_checkpoints(tmp_path):
    """Ours carry their own."""
    store.save_model(mlp_model(), tmp_path)
    with pytest.raises(ValueError, match="config="):
        load(tmp_path, config={})


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.pkl", "model.safetensors", "model"])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_is_never_executed(tmp_path, name, writer):
    """A pickle with code is refused under whatever name, and its code has not run."""
    target = tmp_path / "owned"
    bomb = {"weights": torch.zeros(2), "bomb": Bomb(str(target))}
    path = tmp_path / name
    if writer == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path)
    with pytest.raises(ValueError, match=r"safetensors|[nN]othing in it was executed"):
        load(path)
    assert not target.exists()
    content = path.read_bytes()
    pickle.loads(content) if writer == "pickle" else torch.load(io.BytesIO(content), weights_only=False)
    assert target.exists()  # the bomb is a real one


def test_only_what_can_be_rebuilt_is_saved(tmp_path):
    """A network and an SDE of one's own that nobody has registered are refused before anything is written."""

    class Own(VPSDE):
        pass

    with pytest.raises(TypeError, match="Linear"):
        store.save_model(ScoreNet(nn.Linear(3, 3), VPSDE()), tmp_path / "m")
    with pytest.raises(TypeError, match="Own"):
        store.save_model(ScoreNet(MLP(3), Own()), tmp_path / "m")
    assert not (tmp_path / "m").exists()


# -- atomicity -------------------------------------------------------------------------------------------------------


def test_an_exception_in_the_middle_of_a_write(tmp_path):
    """The old file is untouched and no temporary file is left."""
    path = tmp_path / "file"
    path.write_text("old")

    def half(p):
        p.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_atomic(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_failing_to_rename_or_flush(tmp_path, monkeypatch, function):
    """A full disk shows as an error of fsync or rename: raised, with the old model intact."""
    old = mlp_model()
    store.save_model(old, tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, function, fail)
        with pytest.raises(OSError, match="No space left"):
            store.save_model(shaken(mlp_model(), 4), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert_same_model(load(tmp_path), old)


def test_the_new_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """fsync comes first: otherwise a power cut could leave an empty file under the final name."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    store.write_json(tmp_path / "a.json", {"x": 1})
    assert calls[:2] == ["fsync", "replace"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_folder_that_cannot_be_written(tmp_path):
    """Below a regular file nothing can be created: an OSError that names the path."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        store.save_model(mlp_model(), tmp_path / "file" / "model")


def test_files_can_be_read_by_others(tmp_path):
    """The temporary file's private mode does not stay."""
    store.save_model(mlp_model(), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


KILLED_SAVES = """
import os, signal, sys, time, torch
from scoresde import store, ScoreNet, VPSDE
from scoresde.nets import MLP
torch.set_num_threads(1)
models = []
for value in (1.0, 2.0):
    model = ScoreNet(MLP(3, width=256), VPSDE(), "edm")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    models.append(model)
store.save_model(models[0], sys.argv[1])
for attempt in range(12):
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                store.save_model(model, sys.argv[1])
    time.sleep(0.02 + 0.0037 * attempt)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    values = {float(v) for p in store.load_model(sys.argv[1]).parameters() for v in (p.min(), p.max())}
    print(*sorted(values), flush=True)
"""


def test_kill_9_while_saving(tmp_path):
    """SIGKILL at twelve moments of a loop of saves leaves one whole model or the other, never a mixture."""
    run = subprocess.run(
        [sys.executable, "-c", KILLED_SAVES, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(store.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    answers = run.stdout.split("\n")[:-1]
    assert len(answers) == 12
    assert set(answers) <= {"1.0", "2.0"}
    left = os.listdir(tmp_path / "model")
    assert {"model.safetensors", "config.json"} <= set(left)
