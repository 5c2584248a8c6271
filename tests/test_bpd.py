"""`scoresde bpd` on many images: killed, interrupted, damaged, in parts, and always the numbers of one undisturbed process."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

import scoresde
from scoresde import CosineSDE, Hadamard, QuantizedScoreNet, bits_per_dim, store
from scoresde.cli import main as entry
from scoresde.data import Images, digits
from scoresde.jobs import BitsJob, bits
from scoresde.nets import LeanUNet

N, BATCH, PROBES, RTOL = 7, 2, 2, 1e-1  # four chunks, the last of one image
STARTS = [0, 2, 4, 6]


def small_model(seed):
    """An untrained digits model."""
    torch.manual_seed(seed)
    net = LeanUNet(
        QuantizedScoreNet.input_channels(1), 17, (8, 8), channels=(8,), blocks=(1,), embedding=8, attention=False
    )
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return QuantizedScoreNet(net, CosineSDE(-10.0, 16.0), 17, event_shape=(1, 8, 8))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """The model in a folder."""
    return store.save_model(small_model(0), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def truth(model_path):
    """The library's own answer for the first seven images, in one call."""
    return bits_per_dim(
        store.load_model(model_path),
        digits("test").values[:N],
        divergence=Hadamard(PROBES, 2),
        rtol=RTOL,
        atol=RTOL,
        batch_size=BATCH,
    )


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No launcher's environment, and warnings as they were before `main`."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def computed(monkeypatch):
    """The index of the first image of each batch that is computed, in order; put one into `stop_at` to press Ctrl-C there."""
    real = bits.bits_per_dim

    class Seen(list):
        stop_at = None

    seen = Seen()

    def watched(net, data, **options):
        if options["first"] == seen.stop_at:
            raise KeyboardInterrupt
        seen.append(options["first"])
        return real(net, data, **options)

    monkeypatch.setattr(bits, "bits_per_dim", watched)
    return seen


def arguments(model_path, out, *more, limit=N):
    """The command that all tests give, options in `more` last."""
    given = {"limit": limit, "probes": PROBES, "rtol": RTOL, "batch_size": BATCH, "out": out}
    given |= dict(zip(more[::2], more[1::2], strict=True))
    return ["bpd", str(model_path), *(str(a) for k, v in given.items() for a in (f"--{k}", v))]


def run(capsys, *args):
    """Exit code, standard output and standard error of one command."""
    capsys.readouterr()
    code = entry.main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


def start(args, **environment):
    """The same command in a process of its own, with as many threads as this one."""
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        [sys.executable, "-m", "scoresde.cli.main", *args],
        env={**os.environ, "OMP_NUM_THREADS": threads, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def chunk_files(out):
    """The stored batches."""
    return sorted((out / "chunks").glob("*.safetensors"))


def values(out):
    """The file of each image's numbers."""
    with np.load(out / "images.npz") as archive:
        return dict(archive)


def same(out, truth):
    """The folder holds what one call gives, bit for bit, each image once."""
    found = values(out)
    assert found["index"].tolist() == list(range(len(truth.status)))
    for name, expected in (
        ("bits_per_dim", truth.per_example),
        ("per_draw", truth.per_draw),
        ("trace_stderr", truth.trace_stderr),
        ("nfe", truth.nfe_per_example),
        ("status", truth.status),
    ):
        assert np.array_equal(found[name], expected.numpy()), name
    record = json.loads((out / "result.json").read_text())
    assert (record["bits_per_dim"], record["stderr"], record["nfe"]) == (truth.mean, truth.stderr, truth.nfe)
    assert (record["images"], record["unfinished"]) == (len(truth.status), 0)
    trace = math.sqrt(float((truth.trace_stderr**2).sum())) / len(truth.status)
    assert record["trace_stderr"] == pytest.approx(trace, rel=1e-12)
    assert record["trace_stderr"] > 0
    return record


# -- one process -----------------------------------------------------------------------------------------------------


def test_the_result_of_one_process(capsys, model_path, truth, tmp_path, computed):
    """What the library gives, in two files and one line; the last batch is smaller; asked again, nothing is computed."""
    command = arguments(model_path, tmp_path)
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert computed == STARTS
    record = same(tmp_path, truth)
    line = f"digits:test: {truth.mean:.3f} +- {truth.stderr:.3f} bits/dim over 7 images "
    assert out.startswith(line)
    assert out.count("\n") == 1
    assert str(tmp_path / "result.json") in out
    assert record["model"] == str(model_path)
    assert record["data"] == "digits:test"
    assert record["version"] == scoresde.__version__
    assert record["seconds"] > 0
    assert [record[k] for k in ("probes", "rtol", "seed", "batch_size", "levels")] == [PROBES, RTOL, 0, BATCH, 17]
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert f"{tmp_path}: 7 of 7 images are there already." in out
    assert out.splitlines()[1].startswith(line)
    assert computed == STARTS
    assert same(tmp_path, truth)["seconds"] == record["seconds"]  # of the work, not of the second look


def test_the_running_estimate(capsys, model_path, truth, tmp_path, computed):
    """The bar shows mean +- standard error over all images so far, also over those that were there before."""
    code, _, err = run(capsys, *arguments(model_path, tmp_path))
    assert code == 0
    shown = [(float(a), float(b)) for a, b in re.findall(r"([0-9.]+) \+- ([0-9.]+|nan) bits/dim", err)]
    x = truth.per_example
    expected = [(float(x[:n].mean()), float(x[:n].std() / math.sqrt(n))) for n in (2, 4, 6, 7)]
    assert list(dict.fromkeys(shown)) == [(round(a, 3), round(b, 3)) for a, b in expected]
    assert "7/7" in err
    chunk_files(tmp_path)[1].unlink()
    code, _, err = run(capsys, *arguments(model_path, tmp_path))
    assert f"{truth.mean:.3f} +- {truth.stderr:.3f} bits/dim" in err
    assert "5/7" in err
    assert computed == [*STARTS, 2]


def test_the_library_shows_the_same_estimate(capsys, model_path, truth):
    """`bits_per_dim(progress=True)` as well."""
    options = dict(divergence=Hadamard(PROBES, 2), rtol=RTOL, atol=RTOL, batch_size=4, progress=True)
    got = bits_per_dim(store.load_model(model_path), digits("test").values[:N], **options)
    assert f"{got.mean:.3f} +- {got.stderr:.3f} bits/dim" in capsys.readouterr().err


def test_a_part_of_the_data_draws_as_in_the_whole(model_path, truth):
    """first=4: images 4, 5, 6 of the whole; an index below 0 is refused."""
    model, data = store.load_model(model_path), digits("test").values[:N]
    options = dict(divergence=Hadamard(PROBES, 2), rtol=RTOL, atol=RTOL, batch_size=BATCH)
    assert torch.equal(bits_per_dim(model, data[4:], first=4, **options).per_example, truth.per_example[4:])
    assert not torch.equal(bits_per_dim(model, data[4:], **options).per_example, truth.per_example[4:])
    for first in (-1, 1.5, True):
        with pytest.raises(ValueError, match="first must be an int >= 0"):
            bits_per_dim(model, data, first=first, **options)


def test_the_default_folder(capsys, model_path, tmp_path, monkeypatch, computed):
    """runs/bpd-CODE: the same for the same command, another one for another setting."""
    monkeypatch.chdir(tmp_path)
    command = [a for a in arguments(model_path, "x") if a not in ("--out", "x")]
    for more in ([], [], ["--seed", "1"]):
        assert run(capsys, *command, *more)[0] == 0
    assert computed == 2 * STARTS
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(re.fullmatch("bpd-[0-9a-f]{10}", f.name) for f in folders)


def test_seed_samples_draws_and_dequantization(capsys, model_path, tmp_path):
    """They reach the library, and each draw's bound is stored."""
    code, _, err = run(
        capsys,
        *arguments(
            model_path, tmp_path, "dequantization", "truncated-normal", "samples", 2, "draws", 2, "seed", 3, limit=2
        ),
    )
    assert code == 0, err
    expected = bits_per_dim(
        store.load_model(model_path),
        digits("test").values[:2],
        dequantization="truncated-normal",
        samples=2,
        draws=2,
        seed=3,
        divergence=Hadamard(PROBES, 2),
        rtol=RTOL,
        atol=RTOL,
        batch_size=BATCH,
    )
    record = same(tmp_path, expected)
    assert values(tmp_path)["per_draw"].shape == (2, 2)
    assert record["draw_stderr"] == expected.draw_stderr > 0


def test_one_image_has_no_standard_error(capsys, model_path, tmp_path):
    """It is null in the file, which stays JSON."""
    assert run(capsys, *arguments(model_path, tmp_path, limit=1))[0] == 0
    text = (tmp_path / "result.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["stderr"] is None


def test_images_that_do_not_finish(capsys, model_path, tmp_path):
    """They are counted, said once at the end, NaN in the file, and left out of the mean and the running estimate."""
    images = Images(digits("test").values[:N], 17, "some")
    options = dict(estimator=dict(probes=1, rtol=1e-2), dequantization={}, seed=0, batch_size=BATCH)
    adaptive = dict(method="tsit5", plan=None)  # whose cost differs from image to image
    whole = BitsJob(store.load_model(model_path), images, tmp_path / "whole", **options)
    whole.options.update(adaptive)
    whole.run()
    whole.result()
    nfe = values(tmp_path / "whole")["nfe"]
    limit = int(np.median(nfe))
    assert nfe.min() <= limit < nfe.max()
    job = BitsJob(store.load_model(model_path), images, tmp_path / "part", **options)
    job.options.update(adaptive, max_nfe=limit)
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        job.run()
        job.result()
    assert [re.sub(r"\d of", "some of", str(w.message))[:40] for w in said] == [
        "some of 7 examples did not finish (see ."
    ]
    got, good = values(tmp_path / "part"), values(tmp_path / "part")["status"] == 0
    assert 0 < good.sum() < N
    assert np.array_equal(np.isnan(got["bits_per_dim"]), ~good)
    record = json.loads((tmp_path / "part" / "result.json").read_text())
    assert f"{record['bits_per_dim']:.3f} +- {record['stderr']:.3f} bits/dim" in capsys.readouterr().err
    assert record["unfinished"] == N - good.sum()
    assert record["bits_per_dim"] == pytest.approx(got["bits_per_dim"][good].mean(), abs=1e-12)


# -- interruptions ---------------------------------------------------------------------------------------------------


def test_resume_after_a_kill(capsys, model_path, tmp_path, computed):
    """SIGKILL in the middle: what was stored stays as it is, the rest is computed, and the sum is that of one process."""
    images = 24
    process = start(arguments(model_path, tmp_path / "killed", limit=images))
    deadline = time.monotonic() + 120
    while len(chunk_files(tmp_path / "killed")) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in chunk_files(tmp_path / "killed")}
    assert 2 <= len(before) < images // BATCH
    assert not (tmp_path / "killed" / "result.json").exists()
    code, out, err = run(capsys, *arguments(model_path, tmp_path / "killed", limit=images))
    assert code == 0, err
    assert f"{2 * len(before)} of 24 images are there already." in out
    assert computed == list(range(2 * len(before), images, BATCH))
    assert all((p.read_bytes(), p.stat().st_mtime_ns) == seen for p, seen in before.items())
    expected = bits_per_dim(
        store.load_model(model_path),
        digits("test").values[:images],
        divergence=Hadamard(PROBES, 2),
        rtol=RTOL,
        atol=RTOL,
        batch_size=BATCH,
    )
    same(tmp_path / "killed", expected)


def test_ctrl_c(capsys, model_path, truth, tmp_path, computed):
    """Exit code 130 and how much is stored; the same command goes on, and each image is computed once in all."""
    computed.stop_at = 4
    code, _, err = run(capsys, *arguments(model_path, tmp_path))
    assert code == 130
    assert f"stopped by Ctrl-C. 4 of 7 images are in {tmp_path}; the same command goes on." in err
    assert "Traceback" not in err
    computed.stop_at = None
    assert run(capsys, *arguments(model_path, tmp_path))[0] == 0
    assert computed == STARTS
    same(tmp_path, truth)


def test_another_batch_size_goes_on(capsys, model_path, truth, tmp_path, computed):
    """Memory was short: the files keep their images, in smaller batches; larger ones than they began with are not taken."""
    computed.stop_at = 4
    assert run(capsys, *arguments(model_path, tmp_path, "batch_size", 4))[0] == 130
    computed.stop_at = None
    code, out, _ = run(capsys, *arguments(model_path, tmp_path, "batch_size", 1))
    assert code == 0
    assert computed == [0, 4]
    assert np.abs(values(tmp_path)["bits_per_dim"] - truth.per_example.numpy()).max() < 1e-4
    chunk_files(tmp_path)[0].unlink()
    code, out, _ = run(capsys, *arguments(model_path, tmp_path, "batch_size", 64))
    assert code == 0
    assert "batches have 4 images, with which this folder was begun, not 64" in out
    assert computed == [0, 4, 0]


def damage(kind, files):
    """Spoil the second of the files in one of the ways of the world."""
    data = bytearray(files[1].read_bytes())
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "empty":
        data = b""
    elif kind == "a number changed":
        data[-20] ^= 4
    elif kind == "the header changed":
        at = data.index(b"seconds")
        data[at] = ord("S")
    elif kind == "of other images":
        data = files[2].read_bytes()
    files[1].write_bytes(bytes(data))


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "a number changed", "the header changed", "of other images", "of another command"]
)
def test_a_damaged_file_is_computed_again(capsys, model_path, truth, tmp_path, computed, kind):
    """Whatever is wrong with it, that is said, and no number of it is used."""
    out = tmp_path / "out"
    assert run(capsys, *arguments(model_path, out))[0] == 0
    if kind == "of another command":
        assert run(capsys, *arguments(model_path, tmp_path / "other", "seed", 5))[0] == 0
        chunk_files(out)[1].write_bytes(chunk_files(tmp_path / "other")[1].read_bytes())
    else:
        damage(kind, chunk_files(out))
    computed.clear()
    code, text, err = run(capsys, *arguments(model_path, out))
    assert code == 0
    assert f"warning: the 2 images of a stored file are computed again: {chunk_files(out)[1]}" in err
    assert "5 of 7 images are there already." in text
    assert computed == [2]
    same(out, truth)


def test_an_unfinished_file_is_no_result(capsys, model_path, truth, tmp_path, computed):
    """What a kill in the middle of a write leaves lies beside the files, under another name."""
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / ".00000002.safetensors.x1y2.tmp").write_bytes(b"half")
    assert run(capsys, *arguments(model_path, tmp_path))[0] == 0
    assert computed == STARTS
    same(tmp_path, truth)
