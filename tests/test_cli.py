"""The command line in process: what each command writes and prints, and that every error is one line."""

import dataclasses
import inspect
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scoresde.data
import scoresde.train
from scoresde import VPSDE, CosineSDE, QuantizedScoreNet, ScoreNet, store
from scoresde.cli import commands
from scoresde.cli import demo as demo_room
from scoresde.cli import main as entry
from scoresde.cli.run import COMMANDS
from scoresde.jobs import locked
from scoresde.nets import MLP, LeanUNet
from scoresde.samplers import ProbabilityFlow
from scoresde.train import TRAIN_PRESETS, loop, setup

TINY = dict(
    channels=(8, 16),
    blocks=(1, 1),
    batch_size=8,
    steps=4,
    evaluate_every=2,
    checkpoint_every=2,
    augment=0.0,
    minutes=None,
)
SHAPE = (1, 8, 8)
ROOT = Path(__file__).parents[1]


def call(capsys, *args):
    """Exit code, standard output and standard error of one command."""
    capsys.readouterr()
    try:
        code = entry.main([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys, *args, code=2):
    """The one line of an error; there is no traceback."""
    got, out, err = call(capsys, *args)
    assert got == code, (out, err)
    assert "Traceback" not in out + err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A small untrained digits model in a folder."""
    torch.manual_seed(0)
    net = LeanUNet(
        QuantizedScoreNet.input_channels(1), 17, (8, 8), channels=(8,), blocks=(1,), embedding=8, attention=False
    )
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = QuantizedScoreNet(net, CosineSDE(-10.0, 16.0), 17, event_shape=SHAPE)
    return store.save_model(model, tmp_path_factory.mktemp("model"))


@pytest.fixture
def tiny(monkeypatch):
    """All presets as tiny runs on 60 training, 20 validation and 6 test images."""
    small = {k: dataclasses.replace(o, **TINY) for k, o in TRAIN_PRESETS.items()}
    monkeypatch.setattr(scoresde.train, "TRAIN_PRESETS", small)

    real = scoresde.data.digits
    sizes = {"train": 60, "validation": 20, "test": 6}

    def few(split):
        whole = real(split)
        return dataclasses.replace(whole, values=whole.values[: sizes[split]])

    monkeypatch.setattr(scoresde.data, "digits", few)
    monkeypatch.setattr(setup, "digits", few)
    return small


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    """`main` prints warnings in one line; other tests keep their own way."""
    import warnings

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


# -- info and help ---------------------------------------------------------------------------------------------------


def test_info(capsys, model_path):
    """Without a model: versions, methods, SDEs; with one: its configuration and size."""
    code, out, _ = call(capsys, "info")
    assert code == 0
    assert torch.__version__ in out
    assert "ddim" in out
    assert "CosineSDE" in out
    code, out, _ = call(capsys, "info", "--model", model_path)
    assert code == 0
    config, end = json.JSONDecoder().raw_decode(out)
    assert config["model"]["name"] == "QuantizedScoreNet"
    count = sum(p.numel() for p in store.load_model(model_path).parameters())
    assert out[end:].strip() == f"parameters: {count:,}"


def test_a_configuration_of_nothing(capsys):
    """--config says how to read a model: without one there is nothing to say."""
    assert "name the model too" in fails(capsys, "info", "--config", "vp/cifar10_ddpmpp_continuous")


@pytest.mark.parametrize("command", ["sample", "tune", "convert", "demo"])
def test_commands_of_one_process(capsys, monkeypatch, tmp_path, model_path, command):
    """Several of a launcher would write over each other; half a launcher's environment is named."""
    out = tmp_path / "out"
    args = {
        "sample": [model_path, "--out", out],
        "tune": [model_path],
        "convert": [model_path, out],
        "demo": ["--out", out],
    }
    args = [command, *args[command]]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK=None, WORLD_SIZE=2" in fails(capsys, *args)
    monkeypatch.setenv("RANK", "1")
    assert "the work of one process" in fails(capsys, *args)
    assert not out.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    """--help of each command shows its description, every option and what it means."""
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    function = COMMANDS[command]
    text = " ".join(out.split())
    assert function.__doc__.split("\n")[0].strip() in text
    for name in function.__annotations__:
        if name == "return":
            continue
        assert name in text
        meaning = re.search(rf"^        {name}: (.*)$", function.__doc__, re.M).group(1)
        assert meaning[:30] in text


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_options_that_are_written_about_exist(page):
    """Every `scoresde COMMAND ... --option` of the pages is one of that command."""
    for command, rest in re.findall(r"scoresde ([a-z]+)((?: +[^\n`#|]*)?)", (ROOT / page).read_text()):
        if command in COMMANDS:
            for option in re.findall(r"--([a-z_]+)", rest):
                assert option in inspect.signature(COMMANDS[command]).parameters, f"scoresde {command} --{option}"


def test_help_of_the_whole(capsys):
    """Names the program, what it is for, and all commands."""
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "Continuous-time score-based generative models" in out
    assert all(c in out for c in COMMANDS)


@pytest.mark.parametrize(
    "args", [["draw"], ["info", "--modle", "x"], ["sample"], ["sample", "m", "--n", "many"], ["train", "--preset", "x"]]
)
def test_wrong_usage(capsys, args):
    """Unknown commands and options, a missing model, words for numbers: exit code 2 and no traceback."""
    code, out, err = call(capsys, *args)
    assert code == 2
    assert "Traceback" not in out + err
    assert "error" in err


# -- sample ----------------------------------------------------------------------------------------------------------


def test_sample(capsys, model_path, tmp_path):
    """A grid as PNG and integer levels as .npz; image i is the same however many are drawn."""
    args = ["sample", model_path, "--method", "ddim", "--steps", "4", "--seed", "3"]
    code, out, _ = call(capsys, *args, "--n", "5", "--out", tmp_path / "five")
    assert code == 0
    assert str(tmp_path / "five" / "samples.npz") in out
    assert str(tmp_path / "five" / "samples.png") in out
    with np.load(tmp_path / "five" / "samples.npz") as archive:
        five = archive["images"]
    assert five.shape == (5, *SHAPE)
    assert five.dtype == np.uint8
    assert five.max() <= 16
    assert len(np.unique(five)) > 3
    with Image.open(tmp_path / "five" / "samples.png") as image:
        assert np.asarray(image.convert("L")).std() > 5
    assert call(capsys, *args, "--n", "2", "--out", tmp_path / "two")[0] == 0
    with np.load(tmp_path / "two" / "samples.npz") as archive:
        assert np.array_equal(archive["images"], five[:2])


def test_sample_in_chunks(capsys, model_path, tmp_path, monkeypatch):
    """More images than one chunk holds: the same ones, but for pixels that rounding puts across the edge of a level."""
    args = ["sample", model_path, "--method", "euler", "--steps", "3", "--n", "5"]
    assert call(capsys, *args, "--out", tmp_path / "whole")[0] == 0
    monkeypatch.setattr(commands, "CHUNK", 2)
    assert call(capsys, *args, "--out", tmp_path / "parts")[0] == 0
    whole, parts = (np.load(tmp_path / name / "samples.npz")["images"] for name in ("whole", "parts"))
    assert whole.shape == parts.shape
    assert np.mean(whole == parts) > 0.95


def test_tune_and_sample_with_what_it_learned(capsys, model_path, tmp_path):
    """tune leaves a sampler beside the model, whose images sample --method tuned draws; without one it says how to make it."""
    folder = tmp_path / "model"
    shutil.copytree(model_path, folder)
    line = fails(capsys, "sample", folder, "--method", "tuned", "--out", tmp_path / "x")
    assert "there is none yet" in line
    assert "scoresde tune MODEL" in line
    learn = ("tune", folder, "--nfe", 3, "--starts", 16, "--iterations", 2, "--teacher_nfe", 12)
    code, out, _ = call(capsys, *learn)
    assert code == 0
    assert "3 NFE, 8 held-out starts: rms" in out
    assert "saved" in out
    assert (folder / "sampler-3.safetensors").is_file()
    code, _, _ = call(capsys, "sample", folder, "--method", "tuned", "--n", 2, "--out", tmp_path / "x")
    assert code == 0
    assert np.load(tmp_path / "x" / "samples.npz")["images"].shape == (2, *SHAPE)
    assert "samplers of 3 evaluations" in fails(
        capsys, "sample", folder, "--method", "tuned", "--nfe", 4, "--out", tmp_path
    )
    code, _, _ = call(capsys, "sample", folder, "--method", "auto", "--nfe", 4, "--n", 2, "--out", tmp_path / "y")
    assert code == 0


def test_sample_of_a_model_without_levels(capsys, tmp_path):
    """Floats are written as they are, and vectors make no picture."""
    torch.manual_seed(0)
    store.save_model(ScoreNet(MLP(3, width=8, depth=1), VPSDE(), "edm", event_shape=(3,)), tmp_path / "m")
    code, out, _ = call(
        capsys, "sample", tmp_path / "m", "--n", "4", "--method", "heun", "--steps", "3", "--out", tmp_path
    )
    assert code == 0
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["images"].dtype == np.float32
        assert archive["images"].shape == (4, 3)
    assert "png" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n", "0"], "n must be at least 1, got 0"),
        (["--n", "-3"], "n must be at least 1, got -3"),
        (["--method", "ddim", "--steps", "0"], "steps"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--device", "xla"], "device 'xla'"),
        (["--device", "meta"], "device 'meta'"),
        (["--device", "mps"], "torch cannot use device 'mps' here"),
        (["--device", "cuda:7"], "cuda"),
        (["--method", "ddim", "--steps", "1000000000"], "steps must be at most 1,000,000"),
        (["--method", "auto", "--nfe", "1000000000"], "nfe must be at most 1,000,000"),
    ],
)
def test_sample_errors(capsys, model_path, tmp_path, args, message):
    """Impossible numbers are one line that says which, and nothing is written."""
    assert message in fails(capsys, "sample", model_path, "--out", tmp_path / "out", *args)
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_unknown_method(capsys, model_path, tmp_path):
    """The methods that there are are listed."""
    code, out, err = call(capsys, "sample", model_path, "--method", "magic", "--out", tmp_path)
    assert code == 2
    assert "Traceback" not in out + err
    assert "magic" in err
    assert "ddim" in err


@pytest.mark.parametrize("command", ["sample", "bpd", "info"])
def test_missing_and_damaged_models(capsys, model_path, tmp_path, command):
    """Each command names the path: nothing there, no model in it, a damaged one, a pickle."""
    option = ["--model"] if command == "info" else []
    assert "nowhere" in fails(capsys, command, *option, tmp_path / "nowhere")
    assert "holds no scoresde model" in fails(capsys, command, *option, tmp_path)
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes((model_path / "model.safetensors").read_bytes()[:500])
    assert str(damaged) in fails(capsys, command, *option, tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "m.pt")
    assert "pickle" in fails(capsys, command, *option, tmp_path / "m.pt")


def test_a_model_that_does_not_say_its_shape(capsys, tmp_path):
    """It cannot be sampled from the command line, and that is said."""
    store.save_model(ScoreNet(MLP(3, width=8, depth=1), VPSDE()), tmp_path / "m")
    assert "shape" in fails(capsys, "sample", tmp_path / "m", "--out", tmp_path / "out")


def test_output_below_a_file(capsys, model_path, tmp_path):
    """A folder that cannot be made is an error with its name."""
    (tmp_path / "file").write_text("x")
    assert "file" in fails(capsys, "sample", model_path, "--n", "1", "--out", tmp_path / "file" / "out")


# -- bpd -------------------------------------------------------------------------------------------------------------


def test_bpd(capsys, model_path, tmp_path):
    """The first images only, one line of result, and the numbers as JSON; the batch size does not matter."""
    args = ["bpd", model_path, "--limit", "3", "--probes", "1", "--rtol", "1e-2"]
    code, out, _ = call(capsys, *args, "--out", tmp_path / "a")
    assert code == 0
    found = re.search(r"digits:test: ([0-9.]+) \+- ([0-9.]+) bits/dim over 3 images", out)
    record = json.loads((tmp_path / "a" / "result.json").read_text())
    assert float(found.group(1)) == pytest.approx(record["bits_per_dim"], abs=6e-4)
    assert 1.0 < record["bits_per_dim"] < 8.0
    assert record["images"] == 3
    assert record["unfinished"] == 0
    assert record["nfe"] > 5
    assert {
        "stderr",
        "trace_stderr",
        "seconds",
        "cpu_seconds",
        "probes",
        "rtol",
        "data",
        "model",
        "version",
    } <= record.keys()
    assert call(capsys, *args, "--batch_size", "2", "--out", tmp_path / "b")[0] == 0
    assert json.loads((tmp_path / "b" / "result.json").read_text())["bits_per_dim"] == pytest.approx(
        record["bits_per_dim"], abs=1e-3
    )


def test_bpd_of_an_npz_file(capsys, model_path, tmp_path, monkeypatch):
    """Levels are the model's, and those that are given must be; the pixels lie within them."""
    monkeypatch.chdir(tmp_path)  # results go to runs/ there
    path = tmp_path / "a.npz"
    np.savez(path, images=np.full((2, 8, 8), 16, np.uint8))
    quick = ("--probes", "1", "--rtol", "1e-2")
    code, out, _ = call(capsys, "bpd", model_path, "--data", path, *quick)
    assert code == 0
    assert "over 2 images" in out
    assert "maximum 16" in fails(capsys, "bpd", model_path, "--data", path, "--levels", "16")
    line = fails(capsys, "bpd", model_path, "--data", path, "--levels", "256")
    assert "17 levels, got levels=256" in line
    code, out, _ = call(capsys, "bpd", model_path, "--data", path, "--levels", "17", *quick)
    assert code == 0
    assert "2 of 2 images are there already" in out  # the same job
    args = ["--data", path, "--levels", "17", "--probes", "1", "--rtol", "1e-1"]
    assert "limit" in fails(capsys, "bpd", model_path, *args, "--limit", "-1")  # not: all but the last


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "digits:tset"], "tset"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--levels", "256"], "17 levels"),
        (["--limit", "0"], "limit must be at least 1"),
        (["--rtol", "0"], "rtol"),
        (["--probes", "-1"], "probes"),
        (["--batch_size", "0"], "batch_size"),
    ],
)
def test_bpd_errors(capsys, model_path, tmp_path, args, message):
    """Data, levels and numbers that make no sense, each named in one line."""
    assert message in fails(capsys, "bpd", model_path, "--out", tmp_path / "out", *args)


def test_data_of_another_shape(capsys, model_path, tmp_path):
    """Images that the model was not made for: both shapes."""
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8))
    line = fails(capsys, "bpd", model_path, "--data", tmp_path / "a.npz", "--levels", "17", "--out", tmp_path / "out")
    assert "(1, 8, 8)" in line
    assert "(1, 4, 4)" in line


def test_a_damaged_archive(capsys, model_path, tmp_path):
    """Named in one line."""
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut")
    assert "a.npz" in fails(capsys, "bpd", model_path, "--data", tmp_path / "a.npz", "--levels", "17")


# -- train -----------------------------------------------------------------------------------------------------------


def test_train(capsys, tiny, tmp_path):
    """Options override the preset's; model, checkpoints and metrics are there; a second run in OUT is refused."""
    out = tmp_path / "run"
    code, text, _ = call(
        capsys, "train", "--preset", "digits", "--steps", "3", "--seed", "5", "--score", "false", "--out", out
    )
    assert code == 0
    assert "trained 3 steps" in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["options"]["steps"] == metrics["training"]["steps"] == 3
    assert metrics["seed"] == 5
    assert metrics["preset"] == "digits"
    assert metrics["options"]["dropout"] == tiny["digits"].dropout
    assert "test" not in metrics
    assert call(capsys, "info", "--model", out)[0] == 0
    assert "already holds a training run" in fails(capsys, "train", "--out", out)


SMALL = ("--channels", "[8]", "--blocks", "[1]", "--steps", "2", "--batch_size", "4", "--evaluate_every", "2")


@pytest.mark.parametrize(
    ("levels", "shape", "expected"),
    [
        (5, (8, 8), {"parameterization": "levels", "dropout": 0.25, "augment": 0.35}),
        (256, (14, 14), {"parameterization": "edm", "sigma_data": 0.59, "learning_rate": 1e-3, "augment": 0.2}),
    ],
)
def test_train_on_other_data(capsys, tmp_path, monkeypatch, levels, shape, expected):
    """Without a preset the options fit the data and are said in a line; those that are given win; no digits score it."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, levels, (20, *shape), dtype=np.uint8)
    np.savez("mine.npz", images=images)
    code, out, err = call(capsys, "train", "--data", "mine.npz", "--levels", levels, "--seed", 3, *SMALL)
    assert code == 0, err
    first = out.splitlines()[0]
    assert first.startswith(f"20 images of 1 x {shape[0]}x{shape[1]} in {levels} levels, ")
    assert (
        f"parameterization {expected['parameterization']}, channels 8 and blocks 1, one for each of 1 resolution;"
        in first
    )
    metrics = json.loads((tmp_path / "runs" / "mine" / "metrics.json").read_text())
    assert {k: metrics["options"][k] for k in expected} == expected
    assert (metrics["options"]["channels"], metrics["options"]["steps"], metrics["preset"]) == ([8], 2, None)
    assert store.load_model(tmp_path / "runs" / "mine").levels == levels
    assert "test" not in metrics
    code, out, err = call(capsys, "train", "--resume", "true", "--out", "runs/mine")  # with the run's own options
    assert code == 0, err


def test_options_of_training_on_the_command_line(capsys, tiny, tmp_path):
    """What edm's recipe takes can be said, and another process comes with its own options."""
    given = {
        "parameterization": "edm",
        "sigma_data": 0.5,
        "weighting": "edm",
        "time_sampling": "log-normal",
        "sde": "EDMSDE",
        "channels": "[8,16]",
        "blocks": "[1,1]",
        "dropout": 0.0,
        "augment": 0.1,
        "ema": 0.9,
        "threads": 1,
    }
    args = [str(a) for k, v in given.items() for a in (f"--{k}", v)]
    code, _, err = call(capsys, "train", "--score", "false", "--out", tmp_path / "run", *args)
    assert code == 0, err
    options = json.loads((tmp_path / "run" / "metrics.json").read_text())["options"]
    assert {k: options[k] for k in given} == {**given, "channels": [8, 16], "blocks": [1, 1]}
    assert options["sde_options"] == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "steps must be at least 1"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--minutes", "-1"], "minutes"),
        (["--resume", "true"], "no readable checkpoint"),
        (["--batch_size", "0"], "batch_size"),
        (["--learning_rate", ".nan"], "learning_rate"),
        (["--seed", "-1"], "seed must be from 0 to"),
        (["--threads", "1000000"], "threads must be from 1 to 1024"),
        (["--channels", "[8]"], "one entry per resolution"),
    ],
)
def test_train_errors(capsys, tiny, tmp_path, args, message):
    """One line each, and no folder of a run."""
    assert message in fails(capsys, "train", "--out", tmp_path / "run", *args)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("command", ["demo", "train"])
def test_an_interrupted_run_is_resumed_by_the_command_that_it_names(capsys, tiny, tmp_path, monkeypatch, command):
    """Ctrl-C exits with 130; the command in the message, as it stands, finishes that run with its own options."""
    real, pressed = loop._evaluate, []

    def press(*args):
        if not pressed:
            pressed.append(1)
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loop, "_evaluate", press)
    out = tmp_path / "run"
    options = ["--seed", "4"] if command == "demo" else ["--preset", "demo", "--steps", "5", "--score", "false"]
    code, _, err = call(capsys, command, "--out", out, *options)
    assert code == 130
    assert "stopped: interrupted at step 2" in err
    assert "Traceback" not in err
    named = shlex.split(re.search(r"Go on with: scoresde (.*)", err).group(1))
    code, _, err = call(capsys, *named, "--score", "false")
    assert code == 0, err
    assert json.loads((out / "metrics.json").read_text())["training"]["steps"] == (4 if command == "demo" else 5)


# -- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """A few steps of each method."""
    monkeypatch.setattr(demo_room, "DEMO_METHODS", {"pc": 3, "ode": None, "ddim": 4})
    real = ProbabilityFlow.__init__
    monkeypatch.setattr(
        ProbabilityFlow, "__init__", lambda self, rtol=3e-2, atol=3e-2, **k: real(self, rtol, atol, **k)
    )


def test_demo(capsys, tiny, quick, tmp_path, monkeypatch):
    """The whole job: model, metrics with every number that is claimed, three figures, and the table."""
    out = tmp_path / "demo"
    code, text, err = call(capsys, "demo", "--images", "6", "--probes", "1", "--minutes", "0.5", "--out", out)
    assert code == 0, err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["command"] == "demo"
    assert {"versions", "options", "seed", "training", "samples", "test", "seconds"} <= metrics.keys()
    assert {"bits_per_dim", "stderr", "nfe", "seconds", "images", "unfinished"} <= metrics["test"].keys()
    assert metrics["test"]["images"] == 6
    assert 0.5 < metrics["test"]["bits_per_dim"] < 8
    assert metrics["options"]["minutes"] == 0.5
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["training"]["steps"] == 4
    assert set(metrics["samples"]) == {"pc", "ode", "ddim", "real (train)"}
    assert all(0 < m["sliced_wasserstein"] < 17 for m in metrics["samples"].values())
    for name in ("curves.png", "samples.png", "reverse_path.png"):
        with Image.open(out / name) as image:
            assert image.format == "PNG"
            assert np.asarray(image.convert("L")).std() > 5
        assert str(out / name) in text
    assert f"{metrics['test']['bits_per_dim']:.3f} +- {metrics['test']['stderr']:.3f} bits/dim" in text
    for name in metrics["samples"]:
        row = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{metrics['samples'][name]['sliced_wasserstein']:.3f} levels" in row
    assert store.load_model(out).levels == 17
    # a second one is refused, unless it may overwrite, which moves the first aside with all that lies there
    assert "already holds" in fails_last(capsys, "demo", "--out", out)
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr(demo_room, "DEMO_METHODS", {"ddim": 2})
    monkeypatch.setattr(demo_room, "measure", lambda *a, **k: metrics["test"])
    assert call(capsys, "demo", "--images", "4", "--out", out, "--overwrite", "true")[0] == 0
    assert set(json.loads((out / "metrics.json").read_text())["samples"]) == {"ddim", "real (train)"}
    aside = out.with_name(out.name + ".old")
    assert (aside / "notes.txt").read_text() == "mine"
    assert store.load_model(aside).levels == 17  # the earlier demo is whole
    code, text, _ = call(capsys, "demo", "--images", "4", "--out", out, "--overwrite", "true")
    assert code == 0
    assert str(out.with_name(out.name + ".old-2")) in text
    assert (aside / "notes.txt").read_text() == "mine"  # nothing is deleted
    assert store.load_model(out.with_name(out.name + ".old-2")).levels == 17


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_demo_touches_only_what_is_its_own(capsys, tiny, tmp_path):
    """With a wrong option nothing is moved; a folder that no demo wrote is refused; one in use is left alone."""
    out, aside = tmp_path / "mine", tmp_path / "mine.old"
    for folder in (out, aside):
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    for wrong in (["--images", "0"], ["--probes", "-1"], ["--minutes", "0"], ["--seed", "-1"], ["--minutes", ".nan"]):
        fails(capsys, "demo", "--out", out, "--overwrite", "true", *wrong)
        assert tree(tmp_path) == before
    assert "was not written by scoresde demo" in fails(capsys, "demo", "--out", out, "--overwrite", "true")
    assert tree(tmp_path) == before
    (out / "scoresde-demo.json").write_text('{"kind": "demo"}')
    before = tree(tmp_path)
    with locked(out):
        assert "in use by process" in fails_last(capsys, "demo", "--out", out, "--overwrite", "true")
    assert tree(tmp_path) == before
    (tmp_path / "file").write_text("x")
    assert "was not written by" in fails(capsys, "demo", "--out", tmp_path / "file", "--overwrite", "true")


def fails_last(capsys, *args):
    """As `fails`, for a command that has said something on standard output before."""
    code, out, err = call(capsys, *args)
    assert code == 2
    assert "Traceback" not in out + err
    assert err.strip().splitlines()[-1].startswith("error: ")
    return err


def test_demo_errors(capsys, tiny, tmp_path):
    """Impossible numbers are refused before the training, not after it."""
    for args, message in [
        (["--images", "0"], "images"),
        (["--probes", "-1"], "probes"),
        (["--minutes", "0"], "minutes"),
    ]:
        assert message in fails_last(capsys, "demo", "--out", tmp_path / "demo", *args)
        assert not (tmp_path / "demo" / "model").exists()
