"""`scoresde bpd` into one folder: other commands are refused, and several processes share the work."""

# ruff: noqa: F811 (fixtures are imported, and asked for by their names)

import numpy as np
import pytest
import torch
from test_bpd import (  # noqa: F401
    BATCH,
    PROBES,
    RTOL,
    STARTS,
    N,
    _alone,
    arguments,
    computed,
    model_path,
    run,
    same,
    start,
    truth,
)

from scoresde import store
from scoresde.cli import commands
from scoresde.data import Images, digits
from scoresde.jobs import BitsJob, share_of

# -- another command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["seed", 1], "(seed: 0 there, 1 now)"),
        (["probes", 3], "(probes: 2 there, 3 now)"),
        (["rtol", 0.2], "(rtol: 0.1 there, 0.2 now)"),
        (["samples", 2], "(samples: 1 there, 2 now)"),
        (["draws", 2], "(draws: 1 there, 2 now)"),
        (["dequantization", "truncated-normal"], "(dequantization: 'uniform' there, 'truncated-normal' now)"),
        (["limit", 6], "images: 7 there, 6 now"),
        (["data", "digits:train"], "(data_sha256: "),
        (["weights", 1], "(model_sha256: "),
    ],
)
def test_another_command_is_refused(capsys, model_path, tmp_path, computed, change, message):
    """It names the setting that differs, computes nothing and changes nothing."""
    out = tmp_path / "out"
    computed.stop_at = 2
    assert run(capsys, *arguments(model_path, out))[0] == 130
    computed.stop_at = None
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert len(before) == 2
    if change[0] == "weights":
        other = store.load_model(model_path)
        with torch.no_grad():
            next(other.parameters()).view(-1)[0] += 1e-6
        command = arguments(store.save_model(other, tmp_path / "other"), out)
    else:
        command = arguments(model_path, out, *change)
    code, _, err = run(capsys, *command)
    assert code == 2
    assert f"{out} holds results of another command" in err
    assert message in err
    assert "another --out" in err
    assert computed == [0]
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_the_same_weights_and_data_under_other_names(capsys, model_path, truth, tmp_path, computed):
    """Contents count, not paths: a copy of the model and of the images goes on."""
    computed.stop_at = 4
    assert run(capsys, *arguments(model_path, tmp_path / "out"))[0] == 130
    computed.stop_at = None
    copy = store.save_model(store.load_model(model_path), tmp_path / "copy")
    np.savez(tmp_path / "copy.npz", images=digits("test").values[:N].numpy())
    code, _, err = run(capsys, *arguments(copy, tmp_path / "out", "data", tmp_path / "copy.npz", "levels", 17))
    assert code == 0, err
    assert computed == STARTS
    same(tmp_path / "out", truth)


@pytest.mark.filterwarnings("ignore:the . images of a stored file")
def test_a_command_that_came_first_in_the_meantime(model_path, tmp_path):
    """Two different ones into one new folder: the second is refused when it wants to store, and nothing is mixed."""
    images = Images(digits("test").values[:N], 17, "some")

    def job(seed, batch_size=BATCH):
        estimator = dict(probes=PROBES, rtol=RTOL)
        net = store.load_model(model_path)
        return BitsJob(net, images, tmp_path, estimator=estimator, dequantization={}, seed=seed, batch_size=batch_size)

    first, second, third = job(0), job(1), job(0, 3)
    first.run((0, 4))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 now"):
        second.run()
    with pytest.raises(ValueError, match=r"begun with batch_size 2 by another process"):
        third.run()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_settings_that_cannot_be_read(capsys, model_path, tmp_path):
    """One line that says which file, and what to do."""
    (tmp_path / "settings.json").write_text('{"format": 1')
    code, _, err = run(capsys, *arguments(model_path, tmp_path))
    assert code == 2
    assert f"{tmp_path / 'settings.json'} is damaged" in err
    assert "--out" in err


def test_bad_commands_leave_nothing(capsys, model_path, tmp_path):
    """Impossible numbers are refused before a folder is there, and so is the file that OUT once was."""
    for change in (["rtol", 0], ["probes", -1], ["samples", 0], ["draws", 0], ["batch_size", 0], ["levels", 256]):
        code, _, err = run(capsys, *arguments(model_path, tmp_path / "out", *change))
        assert code == 2
        assert change[0] in err
    code, _, err = run(capsys, *arguments(model_path, tmp_path / "a.json"))
    assert code == 2
    assert "out is a folder" in err
    assert list(tmp_path.iterdir()) == []


def test_empty_data(capsys, model_path, tmp_path):
    """No images, no result."""
    np.savez(tmp_path / "a.npz", images=np.zeros((0, 8, 8), np.uint8))
    out = tmp_path / "out"
    code, _, err = run(capsys, *arguments(model_path, out, "data", tmp_path / "a.npz", "levels", 17))
    assert code == 2
    assert "must hold at least one image" in err
    assert not out.exists()


# -- parts -----------------------------------------------------------------------------------------------------------


def test_two_processes(model_path, truth, tmp_path):
    """As a launcher starts them, at the same time: the numbers of one process, bit for bit."""
    processes = [start(arguments(model_path, tmp_path), RANK=str(k), WORLD_SIZE="2") for k in range(2)]
    said = [p.communicate(timeout=200) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert any("bits/dim over 7 images" in out for out, _ in said)
    assert ["bits/dim:" in err for _, err in said] == [True, False]  # one bar
    same(tmp_path, truth)


def test_parts_by_hand(capsys, model_path, truth, tmp_path, computed):
    """Three parts one after the other: each says what is missing, the last has the result, no image is computed twice."""
    for part, missing in ((3, 5), (1, 2)):
        code, out, _ = run(capsys, *arguments(model_path, tmp_path, "shard", f"{part}/3"))
        assert code == 0
        assert f"part {part}/3 is done; {missing} of 7 images are still missing in {tmp_path}" in out
        assert "by the same command alone" in out
        assert not (tmp_path / "result.json").exists()
    assert computed == [4, 0, 6]
    code, out, _ = run(capsys, *arguments(model_path, tmp_path, "shard", "2/3"))
    assert code == 0
    assert "bits/dim over 7 images" in out
    assert computed == [4, 0, 6, 2]
    same(tmp_path, truth)


def test_another_number_of_processes_goes_on(capsys, model_path, truth, tmp_path, computed, monkeypatch):
    """Begun by the first of three, gone on with by the second of two, finished by one alone."""
    assert run(capsys, *arguments(model_path, tmp_path, "shard", "1/3"))[0] == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(capsys, *arguments(model_path, tmp_path))[0] == 0
    assert computed == [0, 6, 2]
    monkeypatch.delenv("WORLD_SIZE")
    assert run(capsys, *arguments(model_path, tmp_path))[0] == 0
    assert computed == [0, 6, 2, 4]
    same(tmp_path, truth)


def test_more_parts_than_batches(capsys, model_path, tmp_path, computed):
    """The last have nothing to do and say so like the others."""
    code, out, _ = run(capsys, *arguments(model_path, tmp_path, "shard", "5/9"))
    assert code == 0
    assert computed == []
    assert "part 5/9 is done; 7 of 7 images are still missing" in out


@pytest.mark.parametrize("shard", ["0/2", "3/2", "x", "1", "1/0", "-1/2", "1/2/3", "1.0/2", " 1/2", "²/3"])
def test_a_part_that_is_none(capsys, model_path, tmp_path, shard):
    """One line with what was given and what is expected."""
    command = [*arguments(model_path, tmp_path / "out"), f"--shard={shard}"]
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "shard must be k/n with k from 1 to n" in err
    assert shard.strip() in err
    assert not (tmp_path / "out").exists()


def test_parts_from_the_environment():
    """RANK counts from 0, the parts of the command line from 1; both together, or half an environment, are refused."""
    assert share_of(None, {}) == (0, 1)
    assert share_of(None, {"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1)
    assert share_of(None, {"RANK": "2", "WORLD_SIZE": "3"}) == (2, 3)
    assert share_of("2/8", {}) == (1, 8)
    assert share_of("8/8", {"RANK": "0", "WORLD_SIZE": "1"}) == (7, 8)
    with pytest.raises(ValueError, match="one or the other"):
        share_of("1/2", {"RANK": "0", "WORLD_SIZE": "2"})
    for wrong in ({"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "a", "WORLD_SIZE": "2"}):
        with pytest.raises(ValueError, match="a launcher sets both"):
            share_of(None, wrong)


def test_each_process_has_its_own_device(monkeypatch):
    """LOCAL_RANK chooses among the CUDA devices, and only there; a device that was named is taken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert commands.pick_device("auto") == torch.device("cuda")
    for rank, index in (("0", 0), ("1", 1), ("3", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert commands.pick_device("auto") == torch.device("cuda", index)
        assert commands.pick_device("cuda") == torch.device("cuda", index)
        assert commands.pick_device("cuda:0") == torch.device("cuda", 0)
        assert commands.pick_device("cpu") == torch.device("cpu")
