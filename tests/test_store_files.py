"""What happens to our own files: flipped bits, full disks, replaced models, absurd options, pipes, and random states."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_store import edited, mlp_model, part, shaken, unet_model

from scoresde import VPSDE, GaussianMixture, load, store, tune
from scoresde.samplers import FewStep

DATA = Path(__file__).parent / "data" / "store"
ROOT = str(Path(store.__file__).parents[2])


@pytest.fixture(scope="module")
def tuned():
    """(model, a sampler tuned on it)."""
    model = GaussianMixture.isotropic([[1.0, 0.0], [-1.0, 0.0]], 0.2).diffuse(VPSDE())
    options = dict(starts=16, held_out=8, iterations=1, teacher_nfe=20, jacobian_starts=8, seed=0)
    return model, tune(model, 3, **options)


# -- one bit ---------------------------------------------------------------------------------------------------------


def flips(content, count=200):
    """The content with one bit changed, at `count` places all over it and at each of the first 16 bytes."""
    g = np.random.default_rng(0)
    places = [*range(16), *g.integers(0, len(content), count).tolist()]
    for i in places:
        damaged = bytearray(content)
        damaged[i] ^= 1 << int(g.integers(8))
        yield i, bytes(damaged)


@pytest.mark.parametrize("kind", ["model", "sampler", "training"])
def test_one_flipped_bit_is_noticed(kind, tuned, tmp_path):
    """Anywhere in a file of ours, in numbers, names, options or the digest itself: an error with the file's name."""
    if kind == "training":
        path = tmp_path / "training.safetensors"
        store.write_tensors(path, {"model.a": torch.randn(5, 5), "optimizer.0.step": torch.tensor(3.0)})
        read = lambda: store.read_tensors(path)  # noqa: E731
    elif kind == "sampler":
        store.save_model(tuned[0], tmp_path, [tuned[1]])
        path = tmp_path / "sampler-3.safetensors"
        read = lambda: store.load_samplers(tmp_path)  # noqa: E731
    else:
        store.save_model(mlp_model(), tmp_path)
        path = tmp_path / "model.safetensors"
        read = lambda: load(path)  # noqa: E731
    read()
    whole = path.read_bytes()
    for i, damaged in flips(whole):
        path.write_bytes(damaged)
        try:
            read()
        except ValueError as e:
            assert path.name in str(e)  # noqa: PT017
        else:
            pytest.fail(f"a changed bit of byte {i} of {len(whole)} was not noticed")
    path.write_bytes(whole)
    read()


def test_a_flipped_bit_in_the_options_of_a_training(tmp_path):
    """training.json, which holds step, options and curves, is covered by the file of tensors beside it."""
    from scoresde.train import checkpoint

    model = mlp_model()
    optimizer = torch.optim.Adam(model.parameters())
    progress = checkpoint.Progress(step=7, history=[{"step": 7.0, "loss": 0.123456}])
    checkpoint.save(tmp_path, model, model, optimizer, progress, {"lr": 1e-3, "seed": 3}, {"processes": 1})
    saved, problems = checkpoint.read_latest(tmp_path)
    assert (saved.progress, saved.options, problems) == (progress, {"lr": 1e-3, "seed": 3}, [])
    path = tmp_path / "checkpoints" / "step-00000007" / "training.json"
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        saved, problems = checkpoint.read_latest(tmp_path)
        if saved is None:
            assert "step-00000007" in problems[0]
        else:  # a space that became another one, or the end of the line
            assert (saved.progress, saved.options) == (progress, {"lr": 1e-3, "seed": 3})


def test_files_without_a_digest_say_so(tmp_path):
    """What an older version wrote is read with a warning; in a file of this version the digest may not be missing."""
    from safetensors.torch import save_file

    path = tmp_path / "training.safetensors"
    save_file({"a": torch.ones(2)}, str(path))
    with pytest.warns(UserWarning, match="before files carried a digest"):
        assert store.read_tensors(path)[1] is None
    store.save_model(mlp_model(), tmp_path)
    tensors, header = store.read_tensors(tmp_path / "model.safetensors")
    for meta in (
        {"scoresde": json.dumps(header)},
        {"scoresde": json.dumps(header | {"format": 2}), "sha257": "0" * 64},
    ):
        save_file(tensors, str(tmp_path / "model.safetensors"), metadata=meta)
        with pytest.raises(ValueError, match="digest is missing"):
            load(tmp_path)


def test_the_digest_is_of_what_is_read(tmp_path):
    """Reading and writing again gives the same digest; other names, shapes, types, bytes or headers another."""
    a = {"x": torch.arange(4.0), "y": torch.zeros((), dtype=torch.bfloat16), "z": torch.zeros(0, 3, dtype=torch.bool)}
    found = {store.digest(a), store.digest(a, 1)}
    for change in ({"x": a["x"].reshape(2, 2)}, {"x": a["x"] + 1}, {"x": a["x"].int()}, {"w": a["y"]}):
        found.add(store.digest(a | change))
    assert len(found) == 6
    store.write_tensors(tmp_path / "a", a, {"k": 1})
    assert store.digest(store.read_tensors(tmp_path / "a")[0]) == store.digest(a)


# -- samplers beside a model -----------------------------------------------------------------------------------------


def test_a_sampler_of_another_model_is_refused(tuned, tmp_path):
    """Beside its own model, saved again or elsewhere, it is found; once the model is replaced, the file is named."""
    model, sampler = tuned
    store.save_model(model, tmp_path, [sampler])
    assert list(store.load_samplers(tmp_path)) == [3]
    store.save_model(model, tmp_path)
    assert list(store.load_samplers(tmp_path)) == [3]
    store.save_model(GaussianMixture.isotropic([[1.0, 0.1], [-1.0, 0.0]], 0.2).diffuse(VPSDE()), tmp_path)
    with pytest.raises(ValueError, match=r"sampler-3\.safetensors was tuned on another model.*tune again"):
        store.load_samplers(tmp_path)


def test_a_sampler_that_knows_its_model(tuned, tmp_path):
    """What is loaded says which model it is for, and is not written beside another one."""
    model, sampler = tuned
    store.save_model(model, tmp_path / "a", [sampler])
    (loaded,) = store.load_samplers(tmp_path / "a").values()
    assert loaded.model_sha256 == store.model_digest(model)
    store.save_sampler(loaded, tmp_path / "a")
    store.save_model(mlp_model(), tmp_path / "b")
    with pytest.raises(ValueError, match=r"tuned on another model than the one in .*b; tune"):
        store.save_sampler(loaded, tmp_path / "b")


def test_a_sampler_of_an_older_version(tuned, tmp_path):
    """It does not say whose it is: it is found, with a warning."""
    store.save_model(tuned[0], tmp_path)
    shutil.copy(DATA / "sampler-3.safetensors", tmp_path)
    with pytest.warns(UserWarning, match=r"sampler-3\.safetensors does not say which model"):
        (sampler,) = store.load_samplers(tmp_path).values()
    assert isinstance(sampler, FewStep)


# -- no space --------------------------------------------------------------------------------------------------------

LIMITED = """
import os, resource, sys, warnings
from pathlib import Path
import numpy as np, torch
from scoresde import store
folder = Path(sys.argv[1])
store.write_tensors(folder / "t.safetensors", {"a": torch.zeros(10)}, {"old": 1})
store.write_json(folder / "j.json", {"old": 1})
(folder / "z.npz").write_text("old")
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def archive(p):
    with open(p, "wb") as f:
        np.savez_compressed(f, a=np.random.default_rng(0).integers(0, 255, 10**6, dtype=np.uint8))
for write in (
    lambda: store.write_tensors(folder / "t.safetensors", {"a": torch.randn(10**6)}, {"new": 1}),
    lambda: store.write_json(folder / "j.json", "x" * 10**6),
    lambda: store.write_atomic(folder / "z.npz", archive),
    lambda: store.write_tensors(folder / "new.safetensors", {"a": torch.randn(10**6)}),
):
    try:
        write()
        print("written")
    except store.WriteError as e:
        print(isinstance(e, OSError), e.errno, str(e).replace("\\n", "NEWLINE"))
print(store.read_tensors(folder / "t.safetensors")[1], (folder / "j.json").read_text().split(), (folder / "z.npz").read_text())
print(sorted(os.listdir(folder)))
"""


def limited(folder, limit):
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder), str(limit)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_space(lines, folder, code, words):
    for line, name in zip(lines, ("t.safetensors", "j.json", "z.npz", "new.safetensors"), strict=False):
        assert line.startswith(f"True {code} cannot write {folder / name}: {words}"), line
        assert "free " in line
        assert ("needed " in line) == (name != "z.npz")
        assert "NEWLINE" not in line
    assert lines[4:] == ["{'old': 1} ['{', '\"old\":', '1', '}'] old", "['j.json', 't.safetensors', 'z.npz']"]


def test_a_limit_on_file_sizes(tmp_path):
    """Tensors, JSON and archives beyond it: one line with file and space, the old files intact, nothing left behind."""
    check_space(limited(tmp_path, 100_000), tmp_path, 27, "File larger than this process may write")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="to mount a small disk takes root")
def test_a_full_disk(tmp_path):
    """The same on a disk of 256 kB."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        lines = limited(tmp_path, 0)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    check_space(lines, tmp_path, 28, "No space left on device")


def test_other_errors_stay_what_they_are(tmp_path):
    """Only want of space becomes a WriteError."""

    def fail(p):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError):
        store.write_atomic(tmp_path / "x", fail)
    with pytest.raises(ZeroDivisionError):
        store.write_atomic(tmp_path / "x", lambda p: 1 / 0)
    assert os.listdir(tmp_path) == []


# -- what is no file of a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, 5, 1.5, b"model", [], torch.zeros(1)], ids=repr)
def test_paths_of_the_wrong_kind(path):
    """Said at the boundary of everything that takes a path."""
    for function in (load, store.load_model, store.load_samplers, lambda p: store.save_model(mlp_model(), p)):
        with pytest.raises(TypeError, match=r"must be text or a pathlib\.Path, got"):
            function(path)
    with pytest.raises(ValueError, match="is empty"):
        load("")


def in_time(function, seconds=30):
    """The function's result; a failure where it took long."""
    start = time.monotonic()
    try:
        return function()
    finally:
        assert time.monotonic() - start < seconds


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint_1.pth", "x.pkl", "bare"])
def test_pipes_and_devices(name, tmp_path):
    """Neither is opened: an error at once."""
    os.mkfifo(tmp_path / name)
    for path, what in ((tmp_path / name, "pipe"), ("/dev/zero", "device")):
        with pytest.raises(ValueError, match=f"is a {what}; only regular files"):
            in_time(lambda path=path: load(path))


ABSURD = [
    part("net", {"name": "MLP", "options": {"dim": 3, "depth": 10**6}}),
    part("net", {"name": "MLP", "options": {"dim": 3, "width": 10**6}}),
    part("net", {"name": "MLP", "options": {"dim": 3, "width": 10**10}}),
    part("net", {"name": "MLP", "options": {"dim": 3, "width": 2**70}}),
    part("net", {"name": "MLP", "options": {"dim": 3, "classes": 10**12}}),
    part("net", {"name": "UNet", "options": {"in_channels": 3, "out_channels": 3, "size": (8, 8), "blocks": 10**6}}),
    part("net", {"name": "UNet", "options": {"in_channels": 3, "out_channels": 3, "size": (8, 8), "width": 20_000}}),
    part("net", {"name": "DiT", "options": {"in_channels": 3, "out_channels": 3, "size": (8, 8), "depth": 10**6}}),
    part("net", {"name": "DiT", "options": {"in_channels": 3, "out_channels": 3, "size": (8, 8), "width": 24_000}}),
    part(
        "net",
        {"name": "LeanUNet", "options": {"in_channels": 3, "out_channels": 3, "size": (8, 8), "blocks": (1, 10**6)}},
    ),
]


@pytest.mark.parametrize("change", ABSURD, ids=range(len(ABSURD)))
def test_options_of_absurd_size_take_no_memory(change, tmp_path):
    """A small file that asks for a huge network is refused before that is made."""
    import resource

    store.save_model(mlp_model(), tmp_path)
    edited(tmp_path / "model.safetensors", lambda t: None, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        in_time(lambda: load(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("make", [mlp_model, unet_model])
def test_loading_touches_no_random_state(make, tmp_path):
    """torch, NumPy and Python draw after a load what they would have drawn without."""
    store.save_model(shaken(make()), tmp_path)

    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        expected = draws()
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(tmp_path)
        assert draws() == expected
