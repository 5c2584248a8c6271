"""The program from outside: Ctrl-C at any moment, a disk that fills up, and what it must not touch."""

import os
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_runs import rewrite

import scoresde
from scoresde import VPSDE, ScoreNet, store
from scoresde.cli.main import main
from scoresde.nets import LeanUNet
from scoresde.train.checkpoint import folders, read_latest

TRAIN = [
    "train",
    "--parameterization",
    "edm",
    "--channels",
    "[8]",
    "--blocks",
    "[1]",
    "--augment",
    "0",
    "--batch_size",
    "4",
]
STARTED = "import sys; print('started', flush=True); from scoresde.cli.main import main; sys.exit(main())"


def start(args, file_limit=None, code=STARTED):
    """The program in a process of its own, whose files may have at most `file_limit` bytes; returns once Python runs."""
    limit = None if file_limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *(str(a) for a in args)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )
    assert process.stdout.readline() == "started\n"
    return process


def ended(process, code):
    """The last line of its standard error, after checking that it ended with `code` and in one line."""
    _, err = process.communicate(timeout=150)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """40 images of 4 x 4 in 5 levels."""
    path = tmp_path_factory.mktemp("data") / "pixels.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 5, (40, 4, 4), dtype=np.uint8))
    return path


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5, 1.0, 2.0])
def test_ctrl_c_while_starting(seconds, pixels, tmp_path):
    """At any moment after Python runs, importing torch included: one line, no traceback, exit code 130."""
    process = start([*TRAIN, "--data", pixels, "--levels", 5, "--steps", 1_000_000, "--out", tmp_path / "run"])
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    line = ended(process, 130)
    assert line.startswith("stopped")


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2, 3])
def test_ctrl_c_while_training(times, pixels, tmp_path):
    """Once: saved, and the command to go on. Again at once: as it is, with what was saved before. No traceback in any case."""
    out = tmp_path / "run"
    process = start(
        [*TRAIN, "--data", pixels, "--levels", 5, "--steps", 1_000_000, "--checkpoint_every", 20, "--out", out]
    )
    deadline = time.monotonic() + 100
    while not folders(out):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    line = ended(process, 130)
    assert line.startswith("stopped")
    if times == 1:
        assert re.search(r"interrupted at step \d+ of 1000000; saved in .*scoresde train --resume true --out", line)
    saved, problems = read_latest(out)
    assert saved.progress.step >= 20
    assert problems == []


CLUMSY = """
import sys, signal, os
from scoresde.cli import main
import scoresde.cli.run
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass
def run(args):
    if args == ["finaliser"]:
        Dropped()
        while True: pass
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass
    except KeyboardInterrupt as e:
        raise ImportError("KeyboardInterrupt: <EMPTY MESSAGE>") from e
scoresde.cli.run.run = run
print("started", flush=True)
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("where", ["finaliser", "import"])
def test_ctrl_c_that_a_library_would_swallow(where):
    """Dropped by Python in a finaliser, or turned into another error by an extension: an interrupt all the same."""
    assert ended(start([where], code=CLUMSY), 130).startswith("stopped by Ctrl-C.")


def test_importing_the_entry_point_imports_no_torch():
    """So that Ctrl-C finds `main` already there; the public names come when they are asked for."""
    code = (
        "import sys, scoresde.cli.main as m\n"
        "print([n for n in ('torch', 'numpy', 'jsonargparse') if n in sys.modules])\n"
        "import scoresde\n"
        "print(sorted(set(scoresde.__all__) - set(dir(scoresde))), 'torch' in sys.modules)\n"
        "from scoresde import checks, VPSDE, sample\n"
        "print(all(hasattr(scoresde, n) for n in scoresde.__all__), callable(scoresde.sample))\n"
        "namespace = {}\n"
        "exec('from scoresde import *', namespace)\n"
        "print(set(scoresde.__all__) <= set(namespace))\n"
        "try:\n    scoresde.nothing\nexcept AttributeError as e:\n    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == [
        "[]",
        "[] False",
        "True True",
        "True",
        "module 'scoresde' has no attribute 'nothing'",
    ]


def test_every_public_name_is_where_it_is_said_to_be():
    """`__all__` and the module that the names come from hold the same ones."""
    from scoresde import _api

    ours = {n for n, v in vars(_api).items() if not n.startswith("_") and not isinstance(v, type(os))}
    assert ours == set(scoresde.__all__) - {"__version__"}


# -- a disk that fills up --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """An untrained model of 8 x 8 images, some 300 kB."""
    torch.manual_seed(0)
    net = LeanUNet(1, 1, (8, 8), channels=(32,), blocks=(2,), attention=False)
    return store.save_model(
        ScoreNet(net, VPSDE(), "edm", event_shape=(1, 8, 8), levels=17), tmp_path_factory.mktemp("model")
    )


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_full_disk_in_training(pixels, tmp_path):
    """The checkpoint that does not fit is named; what was there before is whole, and the run goes on from it."""
    out = tmp_path / "run"
    command = [*TRAIN, "--data", pixels, "--levels", 5, "--checkpoint_every", 2, "--out", out]
    assert start([*command, "--steps", 4]).wait(timeout=100) == 0
    before = {p: (folders(out)[0] / p).read_bytes() for p in files_of(folders(out)[0])}
    size = max(len(v) for v in before.values())
    line = ended(start([*command, "--out", tmp_path / "full", "--steps", 4], file_limit=size // 2), 2)
    assert line.startswith("error: step 2 could not be saved: ")
    assert "training.safetensors" in line
    assert "no checkpoint was written yet" in line
    assert [f for f in files_of(tmp_path / "full") if "safetensors" in f] == []
    rewrite(folders(out)[0], lambda meta: meta["options"].update(steps=8))
    line = ended(start(["train", "--resume", "true", "--out", out], file_limit=size // 2), 2)
    assert "step 6 could not be saved" in line
    assert f"the last good checkpoint is {folders(out)[0]}" in line
    assert folders(out)[0].name == "step-00000004"
    assert all((folders(out)[0] / p).read_bytes() == v for p, v in before.items() if "training" not in p)
    assert start(["train", "--resume", "true", "--out", out]).wait(timeout=100) == 0
    assert store.load_model(out).levels == 5


@pytest.mark.slow
def test_a_full_disk_in_sample_convert_and_bpd(model_path, tmp_path):
    """One line with the file, exit code 2, and no half of a result."""
    sample = ["sample", model_path, "--method", "ddim", "--steps", 2, "--n", 4]
    line = ended(start([*sample, "--out", tmp_path / "s"], file_limit=100), 2)
    assert "samples.png" in line
    assert files_of(tmp_path / "s") == []
    line = ended(start(["convert", model_path, tmp_path / "c"], file_limit=10_000), 2)
    assert "model.safetensors" in line
    assert list((tmp_path / "c").iterdir()) == []
    bpd = ["bpd", model_path, "--limit", 2, "--probes", 1, "--rtol", 0.1, "--out", tmp_path / "b"]
    line = ended(start(bpd, file_limit=600), 2)
    assert "00000000.safetensors" in line
    assert files_of(tmp_path / "b") == ["settings.json"]
    assert start(bpd).wait(timeout=100) == 0  # and the same command goes on
    assert (tmp_path / "b" / "result.json").is_file()


def test_samples_are_an_archive_and_a_picture_or_nothing(model_path, tmp_path, monkeypatch, capsys):
    """The picture that was already drawn goes where the archive does not fit."""

    def full(file, **arrays):
        assert (tmp_path / "samples.png.part").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    code = main(["sample", str(model_path), "--method", "ddim", "--steps", "2", "--n", "2", "--out", str(tmp_path)])
    assert code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert files_of(tmp_path) == []
