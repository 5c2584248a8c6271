"""Jobs of any kind: what a subclass says is computed once for each item, stored, and summed up."""

import json
import math

import numpy as np
import pytest
import torch

from scoresde.jobs import Job

N = 10


class Squares(Job):
    """The square of seed + i, and which parity it has."""

    kind, task, item, values_file = "squares", "squaring", "number", "numbers.npz"

    def __init__(self, folder, seed=0, batch_size=3):
        self.seed, self.asked = seed, []
        super().__init__(folder, {"seed": seed, "count": N}, N, batch_size)

    def compute(self, rows):
        self.asked.append((rows.start, rows.stop))
        i = torch.arange(rows.start, rows.stop) + self.seed
        return {"square": i.double() ** 2, "odd": i % 2}

    def summary(self, whole):
        return {"sum": float(whole["square"].sum()), "odd": int(whole["odd"].sum()), "unknown": math.nan}

    def estimate(self, known):
        return f"up to {max(float(t['square'].max()) for t in known):g}"


def test_a_job_of_its_own(tmp_path, capsys):
    """Chunks, result, values of all items, the running estimate; nothing is computed twice."""
    job = Squares(tmp_path)
    assert job.result() is None
    job.run()
    assert job.asked == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert "up to 81" in capsys.readouterr().err
    found = job.result({"why": "a test"})
    assert (found["sum"], found["odd"]) == (285.0, 5)
    record = json.loads((tmp_path / "result.json").read_text())
    assert (record["sum"], record["unknown"], record["why"], record["seed"], record["batch_size"]) == (
        285.0,
        None,
        "a test",
        0,
        3,
    )
    with np.load(tmp_path / "numbers.npz") as archive:
        assert archive["square"].tolist() == [i**2 for i in range(N)]
        assert archive["index"].tolist() == list(range(N))
    again = Squares(tmp_path)
    again.run()
    assert again.asked == []
    assert f"{tmp_path}: 10 of 10 numbers are there already." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another command \(seed: 0 there, 1 now\)"):
        Squares(tmp_path, seed=1)


def test_parts_and_damage(tmp_path):
    """Two parts in either order; a damaged chunk is computed again."""
    second, first = Squares(tmp_path), Squares(tmp_path)
    second.run((1, 2))
    assert second.result() is None
    assert "part 2/2 is done; 6 of 10 numbers are still missing" in second.missing((1, 2))
    first.run((0, 2))
    assert (second.asked, first.asked) == ([(3, 6), (9, 10)], [(0, 3), (6, 9)])
    assert second.result()["sum"] == 285.0
    chunk = tmp_path / "chunks" / "00000006.safetensors"
    chunk.write_bytes(chunk.read_bytes()[:-5])
    third = Squares(tmp_path)
    with pytest.warns(UserWarning, match="the 3 numbers of a stored file are computed again"):
        third.run()
    assert third.asked == [(6, 9)]


def test_the_default_folder(tmp_path, monkeypatch):
    """runs/KIND-CODE, with a code of the settings."""
    monkeypatch.chdir(tmp_path)
    names = {Squares(None, seed).folder.name for seed in (0, 0, 1)}
    assert len(names) == 2
    assert all(name.startswith("squares-") for name in names)
