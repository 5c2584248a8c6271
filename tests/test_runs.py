"""Runs and their folders: several processes that train one model, one writer at a time, and resuming what was begun."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from scoresde import load
from scoresde.jobs import launched, locked
from scoresde.jobs.lock import LOCK_FILE, check_free
from scoresde.store import digest, read_tensors, write_tensors
from scoresde.train import TrainingStopped, TrainOptions, loop, options_of, train
from scoresde.train import processes as room
from scoresde.train.checkpoint import folders

STEPS = 6


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """40 images of 4 x 4 in 5 levels."""
    path = tmp_path_factory.mktemp("data") / "pixels.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 5, (40, 4, 4), dtype=np.uint8))
    return path


@pytest.fixture
def options(pixels):
    return TrainOptions(
        data=str(pixels),
        levels=5,
        parameterization="edm",
        channels=(8,),
        blocks=(1,),
        batch_size=4,
        steps=STEPS,
        evaluate_every=STEPS,
        checkpoint_every=3,
        augment=0.0,
        warmup=0,
    )


def command(out, pixels, *more):
    """`scoresde train` of a tiny network, options in `more` last."""
    given = {"data": pixels, "levels": 5, "parameterization": "edm", "channels": "[8]", "blocks": "[1]", "augment": 0}
    given |= {"batch_size": 4, "steps": STEPS, "evaluate_every": STEPS, "checkpoint_every": 3, "out": out}
    given |= dict(zip(more[::2], more[1::2], strict=True))
    return ["-m", "scoresde.cli.main", "train", *(str(a) for k, v in given.items() for a in (f"--{k}", v))]


def start(args, launcher=(), **environment):
    """A process of its own."""
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, *launcher, *args],
        env={**ours, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(count, *more):
    """What stands before a command of `count` processes."""
    return (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(count),
        *more,
        "--no-python",
        sys.executable,
    )


def rewrite(folder, change):
    """A checkpoint as it would be with other facts or options."""
    meta = json.loads((folder / "training.json").read_text())
    change(meta)
    (folder / "training.json").write_text(json.dumps(meta))
    tensors, _ = read_tensors(folder / "training.safetensors")
    write_tensors(folder / "training.safetensors", tensors, {"about_sha256": digest({}, meta)})
    return meta


def raw(run):
    return read_tensors(folders(run)[0] / "training.safetensors")[0]


# -- several processes -----------------------------------------------------------------------------------------------

AGREE = """
import sys, torch, torch.distributed
from scoresde.train import TrainOptions, train
result = train(TrainOptions.from_json(__import__("json").loads(sys.argv[1])), sys.argv[2], device="cpu")
mine = torch.cat([p.detach().flatten() for p in result.model.parameters()])
every = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
torch.distributed.all_gather(every, mine)
agree = all(torch.equal(every[0], p) for p in every)
sys.stdout.write(f"processes {len(every)} agree {agree} steps {result.progress.step}\\n")  # whole: both write at once
"""


@pytest.mark.slow
def test_two_processes_train_one_model(options, tmp_path):
    """Under torchrun on a CPU: both end with the same parameters, which are those of one run over both batches of each step,
    in one folder, with exit code 0."""
    job = start(["-c", AGREE, json.dumps(options.to_json()), str(tmp_path / "run")], torchrun(2))
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    assert out.count(f"processes 2 agree True steps {STEPS}") == 2
    assert [f.name for f in folders(tmp_path / "run")] == ["step-00000006", "step-00000003"]
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "model"]
    assert json.loads((folders(tmp_path / "run")[0] / "training.json").read_text())["facts"]["processes"] == 2
    alone = train(options, tmp_path / "alone").model
    both = load(tmp_path / "run")
    assert any(not torch.equal(a, b) for a, b in zip(alone.parameters(), both.parameters(), strict=True))
    # the gradient is the mean over the two processes' batches: two steps by hand
    from scoresde.rng import derive
    from scoresde.train.loop import _Batches, _learning_rate, _Objective
    from scoresde.train.setup import build_model, build_optimizer, load_splits

    images, _ = load_splits(options)
    model = build_model(options, images).to(memory_format=torch.channels_last)
    optimizer, objective = build_optimizer(model, options), _Objective(model, options)
    batches = _Batches(images, options, model.value_range)
    torch.set_num_threads(1)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, step / STEPS, options)
        for rank in (0, 1):
            seed = derive(options.seed, step, rank)
            x0, cond = batches.draw(torch.Generator().manual_seed(seed))
            torch.manual_seed(seed)
            (objective(x0, cond, torch.Generator().manual_seed(derive(seed, 1))) / 2).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), options.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
    third = read_tensors(folders(tmp_path / "run")[1] / "training.safetensors")[0]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(third[f"model.{name}"], value, rtol=1e-4, atol=1e-6)

    # and by the command line: the run is resumed by as many processes as began it, by no other number
    refused = start(command(tmp_path / "run", options.data, "resume", "true"))
    _, err = refused.communicate(timeout=100)
    assert refused.returncode == 2
    line = err.strip().splitlines()[-1]
    assert "with 1 process: it was trained with 2" in line
    assert f"torchrun --nproc_per_node 2 --no-python scoresde train --resume true --out {tmp_path / 'run'}" in line
    again = start(command(tmp_path / "run", options.data, "resume", "true"), torchrun(2))
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert out.count("trained 6 steps") == 1  # one process speaks
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_another_number_of_processes_is_refused(options, tmp_path, monkeypatch):
    """What one process began, two do not go on with, and the other way round; nothing changes."""
    train(dataclasses.replace(options, steps=3), tmp_path)
    before = raw(tmp_path)
    rewrite(folders(tmp_path)[0], lambda meta: meta["facts"].update(processes=3))
    with pytest.raises(ValueError, match=r"1 process: it was trained with 3.*torchrun --nproc_per_node 3"):
        train(dataclasses.replace(options, steps=3), tmp_path, resume=True)
    assert all(torch.equal(before[k], v) for k, v in raw(tmp_path).items())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "RANK=None, WORLD_SIZE=2"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK=a"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set.*torchrun"),
        ({"ACCELERATE_MIXED_PRECISION": "fp12"}, "unknown mixed precision .*'fp12'.*no, bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "unknown mixed precision"),
    ],
    ids=str,
)
def test_half_an_environment_is_refused(options, tmp_path, monkeypatch, environment, message):
    """A process that says it is one of several that it cannot find, or asks for an unknown precision, does not train."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(options, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_launched():
    """(0, 1) without a launcher or with one process."""
    assert launched({}) == (0, 1)
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1)
    assert launched({"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)


def test_an_error_of_one_process_is_one_of_all(monkeypatch):
    """`together`: the others are told instead of waiting; the one that failed keeps its own error."""

    class Two:
        num_processes = 2

    def gather(said, own):
        said[:] = ["no space", own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(RuntimeError, match="process 0 of this run stopped: no space"), room.together(Two()):
        pass
    with pytest.raises(KeyError), room.together(Two()):
        raise KeyError("own")


# -- one writer ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_training_is_refused_and_the_first_unharmed(options, tmp_path, monkeypatch):
    """While one trains in a folder, another gets exit code 2 and one line; the first ends as if it had been alone."""
    out = tmp_path / "run"
    steps = 100_000
    same = ("steps", steps, "evaluate_every", steps, "checkpoint_every", 50)
    first = start(command(out, options.data, *same))
    try:
        deadline = time.monotonic() + 100
        while not folders(out):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        holder = json.loads((out / LOCK_FILE).read_text())
        assert holder["pid"] == first.pid
        assert holder["host"] == socket.gethostname()
        for resume in ([], ["resume", "true"]):
            second = start(command(out, options.data, *same, *resume))
            _, err = second.communicate(timeout=100)
            assert second.returncode == 2
            assert "Traceback" not in err
            if resume:
                assert f"{out} is in use by process {first.pid} on {socket.gethostname()} since" in err
            else:
                assert "already holds a training run" in err
        with pytest.raises(ValueError, match=f"in use by process {first.pid}"):
            check_free(out)
        at = folders(out)[0].name
        while folders(out)[0].name == at:  # it goes on
            assert first.poll() is None
            time.sleep(0.05)
    finally:
        first.kill()
        first.communicate()
    assert (out / LOCK_FILE).exists()  # what a kill leaves is taken over
    real = loop._step

    def one_step(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loop, "_step", one_step)
    with pytest.raises(TrainingStopped):
        train(TrainOptions.from_json(options_of(out)), out, resume=True)
    assert not (out / LOCK_FILE).exists()
    assert load(out).levels == 5


HOLD = """
import sys, time, pathlib
from scoresde.jobs.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_the_lock(tmp_path):
    """Held by one process at a time; free after a kill, and gone after use."""
    path = tmp_path / "new" / "run"
    with locked(path):
        assert (path / LOCK_FILE).is_file()
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), locked(path):
            pytest.fail("two holders")
        assert (path / LOCK_FILE).is_file()
    assert os.listdir(path) == []
    with contextlib.suppress(RuntimeError), locked(path):
        raise RuntimeError
    assert os.listdir(path) == []
    other = start(["-c", HOLD, str(path)])
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=f"in use by process {other.pid} on .*wait for it or stop it"),
            locked(path),
        ):
            pytest.fail("two holders")
    finally:
        other.kill()
        other.communicate()
    assert (path / LOCK_FILE).is_file()
    check_free(path)
    with locked(path):
        assert json.loads((path / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ({"pid": 1, "host": "elsewhere", "boot": "another", "since": "2020-01-01"}, True),
        ({"pid": 1, "host": "elsewhere", "boot": None}, True),
        ({"pid": 1, "host": socket.gethostname(), "boot": "before the restart"}, False),
        ({"pid": 1, "host": "another container", "boot": "this"}, False),
        ("", False),
        ("not JSON", False),
    ],
    ids=str,
)
def test_what_stands_in_the_lock(tmp_path, text, refused):
    """Another machine's process cannot be asked, so it is believed; this machine's, whatever its name, is asked by the kernel."""
    from scoresde.jobs.lock import _boot

    if isinstance(text, dict):
        text = json.dumps({**text, "boot": _boot() if text["boot"] == "this" else text["boot"]})
    (tmp_path / LOCK_FILE).write_text(text)
    if refused:
        with (
            pytest.raises(ValueError, match=r"in use by process 1 on elsewhere.*no longer runs, remove .*in-use\.json"),
            locked(tmp_path),
        ):
            pass
        assert (tmp_path / LOCK_FILE).read_text() == text
    else:
        with locked(tmp_path):
            pass
        assert not (tmp_path / LOCK_FILE).exists()


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["other pixels", "twice as many", "another order"])
def test_resume_on_other_data(options, pixels, tmp_path, change):
    """The file was replaced: refused with both digests, and nothing changes; a copy of the same images is the same."""
    with np.load(pixels) as archive:
        images = archive["images"]
    mine = tmp_path / "mine.npz"
    np.savez(mine, images=images)
    options = dataclasses.replace(options, data=str(mine), steps=3)
    train(options, tmp_path / "run")
    before = raw(tmp_path / "run")
    np.savez_compressed(mine, images=images)
    train(options, tmp_path / "run", resume=True)
    other = {
        "other pixels": 4 - images,
        "twice as many": np.concatenate([images, images]),
        "another order": images[::-1],
    }
    np.savez(mine, images=other[change])
    with pytest.raises(ValueError, match=r"the images of .*mine\.npz are not those that it was trained on") as error:
        train(options, tmp_path / "run", resume=True)
    known = json.loads((folders(tmp_path / "run")[0] / "training.json").read_text())["facts"]["data_sha256"]
    assert known[:12] in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in raw(tmp_path / "run").items())


def test_a_checkpoint_of_an_earlier_version(options, tmp_path):
    """It calls the sampling of times a law, and knows neither its data's digest nor its processes: it is resumed."""
    short = dataclasses.replace(options, steps=3)
    train(short, tmp_path)

    def age(meta):
        del meta["facts"]
        meta["options"]["law"] = meta["options"].pop("time_sampling")

    assert TrainOptions.from_json(rewrite(folders(tmp_path)[0], age)["options"]) == short
    assert train(short, tmp_path, resume=True).progress.step == 3
    with pytest.raises(ValueError, match="time_sampling: 'importance' in the checkpoint, 'uniform' now"):
        train(dataclasses.replace(short, time_sampling="uniform"), tmp_path, resume=True)


def test_another_precision_is_refused(options, tmp_path):
    """bf16 and single precision are not mixed within a run."""
    short = dataclasses.replace(options, steps=3)
    train(short, tmp_path)
    rewrite(folders(tmp_path)[0], lambda meta: meta["facts"].update(mixed_precision="bf16"))
    with pytest.raises(ValueError, match=re.escape("in mixed precision 'no': it was trained in 'bf16'")):
        train(short, tmp_path, resume=True)
