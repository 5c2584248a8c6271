"""`load`: what kind of checkpoint a path is, and the model in it. Layer 4."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from scoresde.interop import edm, score_sde
from scoresde.interop.diffusers import is_diffusers, is_weights, load_diffusers
from scoresde.interop.files import read_torch
from scoresde.interop.ours import download, is_hub_id
from scoresde.interop.strangers import stranger
from scoresde.models.base import ScoreModel
from scoresde.store import MODEL_FILE, as_path, check_regular, is_ours, load_model, read_tensors

TORCH_FILES = (".pth", ".pt", ".ckpt", ".bin", ".tar")


def load(path_or_hub_id: str | os.PathLike[str], *, config: Any = None) -> ScoreModel:
    """The model in a checkpoint, on the CPU and in evaluation mode; nothing in a file is executed.

    | what it is | recognised by | config |
    |---|---|---|
    | a model, checkpoint or training run of this package | `model.safetensors`, `checkpoints/` | none, it carries its own |
    | score_sde_pytorch | `checkpoint_N.pth`, or its folder | the original's options or published name; `config.json` beside it |
    | diffusers | `model_index.json`, a `config.json` that names a class, a training script's folder | the scheduler's, if missing |
    | EDM | a snapshot `.pkl`, or a state dict | "edm" (default), "vp", "ve", "iddpm", or constructor arguments |

    A name such as "google/ddpm-cifar10-32" that is no path here is looked for on the Hugging Face hub. `config` is a dict, a
    JSON or YAML file, or a name. See `load_score_sde`, `load_diffusers`, `load_edm` for each kind.

    No random state of the process is touched. Raises `TypeError` for what is no path or name, `FileNotFoundError` where there is
    nothing of that name, and `ValueError` for a damaged, foreign or newer file, one with code in it, or options that do not fit
    the weights, saying what it is.
    """
    path = as_path(path_or_hub_id, "path_or_hub_id")
    if not path.exists():
        if Path(path.parts[0] if path.parts else ".").is_dir() or path.suffix in (*TORCH_FILES, ".pkl", ".safetensors"):
            raise FileNotFoundError(f"there is no file or folder {path}; give a model's folder or its {MODEL_FILE}.")
        if not is_hub_id(str(path_or_hub_id)):
            raise FileNotFoundError(f"there is no file or folder {path}; give a model's folder or its {MODEL_FILE}.")
        path = download(str(path_or_hub_id))
    return _from_folder(path, config) if path.is_dir() else _from_file(check_regular(path), config)


def _from_folder(path: Path, config: Any) -> ScoreModel:
    ours = any((path / place / MODEL_FILE).is_file() for place in (".", "model")) or any(
        path.glob("checkpoints/step-*")
    )
    if not ours:
        for place in (path, path / "checkpoints"):
            if any(place.glob("checkpoint*.pth")):
                return score_sde.load_score_sde(place, config)
        if is_diffusers(path):
            return load_diffusers(path, config)
        if any((path / name).is_file() for name in edm.STATE_FILES) or any(path.glob("*.pkl")):
            return edm.load_edm(path, config)
    try:
        return _own(path, config)
    except FileNotFoundError as e:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:6])
        raise FileNotFoundError(
            f"{e} Nor is it a folder of score_sde_pytorch (checkpoint_N.pth), diffusers (model_index.json) or EDM (state.pt, "
            f"*.pkl). {f'In it are {there}; give the file that you mean.' if there else 'It is empty.'}"
        ) from e


def _from_file(path: Path, config: Any) -> ScoreModel:
    zipped = path.suffix != ".safetensors" and zipfile.is_zipfile(path)  # as torch.save writes, under whatever name
    if path.suffix == ".pkl" and not zipped:
        return edm.load_edm(path, config)
    if zipped or path.suffix in TORCH_FILES:
        state = read_torch(path)
        if score_sde.is_checkpoint(state):
            return score_sde.load_score_sde(path, config, state=state)
        if is_weights(path):
            return load_diffusers(path, config)
        if edm.is_state(state):
            return edm.load_edm(path, config, state=state)
        raise stranger(path, state)
    if path.suffix == ".safetensors" and not is_ours(path):
        if is_weights(path):
            return load_diffusers(path, config)
        tensors, _ = read_tensors(path, foreign=True)
        if edm.is_state(tensors):
            return edm.load_edm(path, config)
        raise stranger(path, tensors)
    return _own(path, config)


def _own(path: Path, config: Any) -> ScoreModel:
    if config is not None:
        raise ValueError("config= is for checkpoints without options of their own; a scoresde model carries its own.")
    return load_model(path)
