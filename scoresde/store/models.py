"""Models and tuned samplers in folders. Layer 3; see `scoresde.store`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde._version import __version__
from scoresde.models.base import ScoreModel
from scoresde.samplers import FewStep
from scoresde.sde import SDE
from scoresde.store.files import as_path, check_regular, digest, is_ours, read_tensors, write_json, write_tensors
from scoresde.store.registry import TENSORS, build, describe
from scoresde.store.sketch import on_meta, untouched_random

FORMAT = 3  # 2: noise labels; the lean U-Net has its own name. 3: nested descriptions, digests, every kind of model
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SAMPLER_FILE = "sampler-"


def save_model(model: ScoreModel, folder: str | os.PathLike[str], samplers: Iterable[FewStep] = ()) -> Path:
    """Write `model.safetensors` and `config.json` into `folder`, tuned samplers beside them; returns the folder.

    Raises `TypeError` for models with parts that `describe` does not know, before anything is written, and `WriteError` where
    there is no space, which leaves the old files.
    """
    folder = as_path(folder, "folder")
    options: dict[str, Tensor] = {}
    header = {"format": FORMAT, "version": __version__, "model": describe(model, options)}
    header["buffers"] = _unsaved_buffers(model)
    write_tensors(folder / MODEL_FILE, model.state_dict() | options, header)
    write_json(folder / CONFIG_FILE, header)
    for sampler in samplers:
        save_sampler(sampler, folder)
    return folder


def _unsaved_buffers(model: nn.Module) -> dict[str, str]:
    """The types of buffers that follow from the options, so that no file holds them: {name: "float32"}."""
    saved = model.state_dict().keys()
    return {k: str(v.dtype).removeprefix("torch.") for k, v in model.named_buffers() if k not in saved}


def model_digest(model: ScoreModel) -> str:
    """SHA-256 of a model's weights and of the tensors among its options, as hex digits: which model this is."""
    options: dict[str, Tensor] = {}
    describe(model, options)
    return digest(model.state_dict() | options)


def load_model(path: str | os.PathLike[str]) -> ScoreModel:
    """A model from its folder, a training run's folder, or its safetensors file; on the CPU, in evaluation mode.

    In a run's folder the finished model is taken, or else the newest readable checkpoint. Nothing is unpickled, and no random
    state is touched. Raises `FileNotFoundError` where there is no model, `ValueError` for a damaged or foreign file, options that
    cannot be, or weights that do not fit.
    """
    path = as_path(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}; give a model's folder or its {MODEL_FILE}.")
        return _read_model(path)
    for candidate in (path / MODEL_FILE, path / "model" / MODEL_FILE):
        if candidate.is_file():
            return _read_model(candidate)
    problems = []
    for candidate in sorted((path / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True):
        try:
            model = _read_model(candidate / MODEL_FILE)
        except (ValueError, FileNotFoundError) as e:
            problems.append(str(e))
            continue
        for problem in problems:
            warnings.warn(f"skipped a newer checkpoint: {problem}", stacklevel=2)
        return model
    raise FileNotFoundError(
        f"{path} holds no scoresde model (looked for {MODEL_FILE}, model/{MODEL_FILE} and checkpoints/step-*)."
        + "".join(f" {p}" for p in problems)
    )


def _read_model(path: Path) -> ScoreModel:
    check_regular(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no safetensors file. Models of scoresde are folders with {MODEL_FILE}; pickled checkpoints are "
            "not opened here, since a pickle can run code."
        )
    if not is_ours(path):
        raise ValueError(f"{path} carries no scoresde configuration in its header; it was written by another program.")
    tensors, header = read_tensors(path)
    source = str(path)
    description, buffers = _current(header, source)
    options = {k: tensors.pop(k) for k in list(tensors) if k.startswith(TENSORS)}
    with untouched_random():
        model = _built(description, options, tensors, source)
    _as_stored(model, tensors, buffers)
    load_weights(model, tensors, source)
    return model.eval()


def _current(header: Any, source: str) -> tuple[dict[str, Any], dict[str, str] | None]:
    """(description of the model, types of the buffers that it does not hold or None) from a header of any format so far."""
    try:
        if header["format"] > FORMAT:
            raise ValueError(
                f"{source} was written by scoresde {header['version']} (format {header['format']}); this is "
                f"{__version__} (format {FORMAT}). Upgrade scoresde to read it."
            )
        if header["format"] >= 3:
            return header["model"], dict(header["buffers"])
        options = dict(header["model"]["options"])
        net = dict(header["net"])
        if header["format"] == 1 and net["name"] == "UNet":
            net["name"] = "LeanUNet"
        if options.get("label") is not None:
            options["label"] = {"name": "NoiseLabel", "options": options["label"]}
        return {"name": header["model"]["name"], "options": {"net": net, "sde": header["sde"], **options}}, None
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{source} does not describe a scoresde model: {type(e).__name__}: {e}.") from e


def _built(description: Any, options: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> ScoreModel:
    """The model, after one on the meta device has shown that the file has its weights: options of any size cost no memory."""
    try:
        with on_meta(len(tensors)):
            sketch = build(description, options, source=source, meta=True)
        _check_fit(sketch, tensors, source)
    except RuntimeError:
        pass  # a registered class that computes with its weights when it is made, which on meta it cannot
    model = build(description, options, source=source)
    if not isinstance(model, ScoreModel) or not isinstance(model.sde, SDE):
        raise ValueError(
            f"{source} describes a {type(model).__name__} that is no scoresde model, or one without a process."
        )
    return model


def _as_stored(model: nn.Module, tensors: dict[str, Tensor], buffers: dict[str, str] | None) -> None:
    """Give parameters and buffers the floating-point types that the file has, each its own."""
    if buffers is None:  # formats 1 and 2: what is in no file has the type of the parameters
        kinds = {tensors[k].dtype for k, _ in model.named_parameters() if k in tensors}
        if len(kinds) == 1:
            model.to(kinds.pop())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        wanted = tensors[name].dtype if name in tensors else getattr(torch, (buffers or {}).get(name, ""), value.dtype)
        if wanted != value.dtype and wanted.is_floating_point and value.is_floating_point():
            value.data = value.data.to(wanted)


def _check_fit(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """`ValueError` with all missing, extra and misshapen entries, and those that are no numbers of the right kind."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    both = sorted(own.keys() & tensors.keys())
    shapes = [
        f"{k}: file {tuple(tensors[k].shape)}, model {tuple(own[k].shape)}"
        for k in both
        if own[k].shape != tensors[k].shape
    ]
    types = [f"{k}: file {tensors[k].dtype}, model {own[k].dtype}" for k in both if _kind(own[k]) != _kind(tensors[k])]
    if missing or extra or shapes or types:
        named = (
            ("missing", missing),
            ("not in the model", extra),
            ("of another shape", shapes),
            ("of another type", types),
        )
        parts = [f"{name}: {', '.join(items[:6])}{', ...' if len(items) > 6 else ''}" for name, items in named if items]
        raise ValueError(f"the weights in {source} do not fit the model they describe; {'; '.join(parts)}.")


def _kind(value: Tensor) -> Any:
    return "floating" if value.is_floating_point() else value.dtype


def load_weights(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into the module; `ValueError` with a strict report of missing, extra, misshapen and mistyped entries."""
    _check_fit(module, tensors, source)
    module.load_state_dict(tensors)


def save_sampler(sampler: FewStep, folder: str | os.PathLike[str]) -> Path:
    """Write a tuned sampler as `sampler-<nfe>.safetensors` into its model's folder; returns the file.

    The file names the model by its digest. Raises `ValueError` where the sampler says that it was tuned on another one.
    """
    folder = as_path(folder, "folder")
    tensors, header = sampler.to_tensors()
    there = _digest_in(folder)
    own = getattr(sampler, "model_sha256", None)
    if own is not None and there is not None and own != there:
        raise ValueError(f"this sampler was tuned on another model than the one in {folder}; tune it on that one.")
    path = folder / f"{SAMPLER_FILE}{sampler.default_steps}.safetensors"
    about = {"format": FORMAT, "version": __version__, "model_sha256": own or there, "sampler": header}
    write_tensors(path, tensors, about)
    return path


def _digest_in(folder: Path) -> str | None:
    """`model_digest` of the model in a folder, from its file; None without one."""
    file = folder / MODEL_FILE
    if not file.is_file():
        return None
    with warnings.catch_warnings():  # of a file without a digest speaks `load_model`
        warnings.simplefilter("ignore")
        return digest(read_tensors(file)[0])


def load_samplers(path: str | os.PathLike[str]) -> dict[int, FewStep]:
    """The tuned samplers beside a model, by their number of evaluations.

    Raises `ValueError` for a damaged file, and for a sampler that was tuned on another model than the one in the folder.
    """
    found, folder = {}, model_folder(path)
    files = sorted(folder.glob(f"{SAMPLER_FILE}*.safetensors"))
    there = _digest_in(folder) if files else None
    for file in files:
        tensors, header = read_tensors(file)
        try:
            meant = header.get("model_sha256")
            sampler = FewStep.from_tensors(tensors, header["sampler"])
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{file} does not hold a sampler of scoresde: {type(e).__name__}: {e}.") from e
        if meant is not None and meant != there:
            raise ValueError(
                f"{file} was tuned on another model than the one in {folder}; remove it, or tune again on this model."
            )
        if meant is None:
            warnings.warn(
                f"{file} does not say which model it was tuned on; tune again if the model has changed.", stacklevel=2
            )
        sampler.model_sha256 = meant
        found[sampler.default_steps] = sampler
    return dict(sorted(found.items()))


def model_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a finished model, from that folder, its run's folder or its file. Raises `FileNotFoundError` without one."""
    path = as_path(path)
    for candidate in (path, path / "model", path.parent):
        if (candidate / MODEL_FILE).is_file():
            return candidate
    raise FileNotFoundError(f"{path} holds no finished model (looked for {MODEL_FILE} there and in {path / 'model'}).")
