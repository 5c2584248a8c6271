"""Training checkpoints: folders that appear whole or not at all. Layer 4.

`checkpoints/step-00001000/` holds `model.safetensors` and `config.json` (the averaged model, ready for `load`),
`training.safetensors` (raw parameters, optimizer moments) and `training.json` (options, what else the parameters depend on,
step, history). The folder is
written under another name and renamed once complete. No random state is stored: every step derives its own.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.models.base import ScoreModel
from scoresde.store import digest, load_weights, read_tensors, save_model, write_json, write_tensors
from scoresde.store.registry import TENSORS

KEEP = 2


@dataclass
class Progress:
    """Where a run stands: steps done, wall and CPU seconds of its steps, and the curves."""

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def folders(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


def save(
    run: Path,
    model: ScoreModel,
    average: ScoreModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    options: dict[str, Any],
    facts: dict[str, Any],
) -> Path:
    """Write the checkpoint of `progress.step` and drop all but the newest `KEEP`. An `OSError` leaves those that were there."""
    target = run / "checkpoints" / f"step-{progress.step:08d}"
    draft = target.with_name(target.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {
        f"optimizer.{i}.{k}": torch.as_tensor(v)
        for i, moments in optimizer.state_dict()["state"].items()
        for k, v in moments.items()
    }
    about = {"options": options, "facts": facts, **asdict(progress)}
    try:
        save_model(average, draft)
        write_tensors(draft / "training.safetensors", tensors, {"about_sha256": digest({}, about)})
        write_json(draft / "training.json", about)
        shutil.rmtree(target, ignore_errors=True)  # only there if it was found damaged
        os.replace(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in folders(run)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def save_final(average: ScoreModel, run: Path) -> Path:
    """The finished model in `run/model`, whose files are there together or, where they cannot be written, as they were."""
    draft, target = run / "model.tmp", run / "model"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        save_model(average, draft)
        if not target.exists():
            os.replace(draft, target)
        else:  # resumed when it was finished
            for file in draft.iterdir():
                os.replace(file, target / file.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


@dataclass
class Saved:
    """A checkpoint that was read whole, before anything is overwritten with it. `facts` are what its parameters depend on
    beside the options; there are none in one of an earlier version."""

    folder: Path
    progress: Progress
    options: dict[str, Any]
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    average: dict[str, Tensor]

    def restore(self, model: ScoreModel, average: ScoreModel, optimizer: torch.optim.Optimizer) -> None:
        """Copy parameters, averages and moments in."""
        source = str(self.folder)
        weights = {k[len("model.") :]: v for k, v in self.tensors.items() if k.startswith("model.")}
        load_weights(model, weights, source)
        load_weights(average, self.average, source)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for parameter, moments in optimizer.state.items():  # fused steps read memory in the parameter's own layout
            for name, value in moments.items():
                if value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)


def read_latest(run: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint that can be read, and a message for each newer one that could not."""
    problems: list[str] = []
    for folder in folders(run):
        try:
            tensors, said = read_tensors(folder / "training.safetensors")
            average, _ = read_tensors(folder / "model.safetensors")
            average = {k: v for k, v in average.items() if not k.startswith(TENSORS)}  # the options' are made anew
            meta = json.loads((folder / "training.json").read_text())
            if said is not None and said["about_sha256"] != digest({}, meta):
                raise ValueError("training.json is not as it was written")
            options, facts = meta.pop("options"), meta.pop("facts", {})
            return Saved(folder, Progress(**meta), options, facts, tensors, average), problems
        except (OSError, ValueError, KeyError, TypeError) as e:
            problems.append(f"skipped {folder}: {e}")
    return None, problems


def options_of(run: Path) -> dict[str, Any]:
    """The options of a run's newest readable checkpoint, as `TrainOptions.to_json` wrote them. `ValueError` without one."""
    for folder in folders(run):
        try:
            return json.loads((folder / "training.json").read_text())["options"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise ValueError(f"{run} holds no readable checkpoint to resume from.")
