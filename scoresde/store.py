"""Models on disk: safetensors for the numbers, JSON for the rest, both in one atomic file.

Layer 3. A model is a folder with `model.safetensors`, whose header carries the configuration, and `config.json`, the same
configuration for people. Files are written beside their place and renamed into it, so a crash leaves the old one whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde._version import __version__
from scoresde.models.base import ScoreModel
from scoresde.models.network import NoiseLabel, ScoreNet
from scoresde.models.quantized import QuantizedScoreNet
from scoresde.nets import NETS
from scoresde.samplers import FewStep
from scoresde.sde import SDES

FORMAT = 2  # 2: noise labels; the lean U-Net has its own name
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SAMPLER_FILE = "sampler-"
_HEADER = "scoresde"


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file in the same folder, flush it to disk, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def check_writable(folder: Path) -> None:
    """Fail before any work is done where a folder cannot be written. Raises `PermissionError` naming it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".probe-", suffix=".tmp")
        os.close(handle)
        os.unlink(name)
    except OSError as e:
        raise PermissionError(f"cannot write to {folder} ({e.strerror or e}); choose another folder with --out.") from e


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented JSON."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(path, lambda p: p.write_text(text))


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any] | None = None) -> None:
    """Atomic safetensors file; `header` goes into its metadata as JSON."""
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    meta = {} if header is None else {_HEADER: json.dumps(header)}
    write_atomic(path, lambda p: save_file(plain, str(p), metadata=meta))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and header of a safetensors file. Raises `ValueError` naming the file if it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as f:
            meta = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (safe_open is no dict)
        header = json.loads(meta[_HEADER]) if _HEADER in meta else None
    except (SafetensorError, ValueError, OSError) as e:
        raise ValueError(
            f"{path} is not a readable safetensors file ({e}); it is truncated or damaged. Copy it again, or fall back "
            "to an earlier checkpoint."
        ) from e
    return tensors, header


def digest(tensors: dict[str, Tensor], about: Any = None) -> str:
    """SHA-256, as hex digits, of the names, types, shapes and bytes of tensors, and of `about` as JSON."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def describe(model: ScoreModel) -> dict[str, Any]:
    """The configuration that `build` turns into the same model, without its weights."""
    if type(model) not in (ScoreNet, QuantizedScoreNet):
        raise TypeError(
            f"only ScoreNet and QuantizedScoreNet can be saved, got {type(model).__name__}: what it adds could not be rebuilt."
        )
    net, sde = type(model.net).__name__, type(model.sde).__name__
    if NETS.get(net) is not type(model.net) or SDES.get(sde) is not type(model.sde):
        raise TypeError(
            f"only the package's own networks ({', '.join(NETS)}) and SDEs ({', '.join(SDES)}) can be rebuilt from a "
            f"file, got {net} and {sde}; save your own with torch.save(model.state_dict())."
        )
    options: dict[str, Any] = dict(
        sigma_data=model.sigma_data, event_shape=model.event_shape, levels=model.levels, value_range=model.value_range
    )
    if isinstance(model, ScoreNet):
        options |= {"parameterization": model.parameterization, "label": dataclasses.asdict(model.label)}
    else:
        options["label_range"] = model.label_range
    return {
        "format": FORMAT,
        "version": __version__,
        "model": {"name": type(model).__name__, "options": options},
        "net": {"name": net, "options": model.net.config},
        "sde": {"name": sde, "options": dataclasses.asdict(model.sde)},
    }


def build(config: dict[str, Any], source: str = "the configuration") -> ScoreModel:
    """A fresh model from `describe`'s answer. Raises `ValueError` where it is foreign, newer, or does not fit."""
    try:
        if config["format"] > FORMAT:
            raise ValueError(
                f"{source} was written by scoresde {config['version']} (format {config['format']}); this is "
                f"{__version__} (format {FORMAT}). Upgrade scoresde to read it."
            )
        net_name, options = config["net"]["name"], dict(config["model"]["options"])
        if config["format"] == 1 and net_name == "UNet":
            net_name = "LeanUNet"
        if isinstance(options.get("label"), dict):
            options["label"] = NoiseLabel(**options["label"])
        net = NETS[net_name](**config["net"]["options"])
        sde = SDES[config["sde"]["name"]](**config["sde"]["options"])
        kind = {"ScoreNet": ScoreNet, "QuantizedScoreNet": QuantizedScoreNet}[config["model"]["name"]]
        return kind(net, sde, **options)
    except (KeyError, TypeError) as e:
        raise ValueError(f"{source} does not describe a scoresde model: {type(e).__name__}: {e}.") from e


def save_model(model: ScoreModel, folder: str | os.PathLike[str], samplers: Iterable[FewStep] = ()) -> Path:
    """Write `model.safetensors` and `config.json` into `folder`, tuned samplers beside them; returns the folder."""
    folder = Path(folder)
    config = describe(model)
    write_tensors(folder / MODEL_FILE, model.state_dict(), config)
    write_json(folder / CONFIG_FILE, config)
    for sampler in samplers:
        save_sampler(sampler, folder)
    return folder


def save_sampler(sampler: FewStep, folder: str | os.PathLike[str]) -> Path:
    """Write a tuned sampler as `sampler-<nfe>.safetensors` into its model's folder; returns the file."""
    tensors, header = sampler.to_tensors()
    path = Path(folder) / f"{SAMPLER_FILE}{sampler.default_steps}.safetensors"
    write_tensors(path, tensors, {"format": FORMAT, "version": __version__, "sampler": header})
    return path


def model_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a finished model, from that folder, its run's folder or its file. Raises `FileNotFoundError` without one."""
    path = Path(path)
    for candidate in (path, path / "model", path.parent):
        if (candidate / MODEL_FILE).is_file():
            return candidate
    raise FileNotFoundError(f"{path} holds no finished model (looked for {MODEL_FILE} there and in {path / 'model'}).")


def load_samplers(path: str | os.PathLike[str]) -> dict[int, FewStep]:
    """The tuned samplers beside a model, by their number of evaluations. Raises `ValueError` for a damaged file."""
    found = {}
    for file in sorted(model_folder(path).glob(f"{SAMPLER_FILE}*.safetensors")):
        tensors, header = read_tensors(file)
        try:
            sampler = FewStep.from_tensors(tensors, header["sampler"])
        except (KeyError, TypeError) as e:
            raise ValueError(f"{file} does not hold a sampler of scoresde: {type(e).__name__}: {e}.") from e
        found[sampler.default_steps] = sampler
    return dict(sorted(found.items()))


def load_model(path: str | os.PathLike[str]) -> ScoreModel:
    """A model from its folder, a training run's folder, or its safetensors file; on the CPU, in evaluation mode.

    In a run's folder the finished model is taken, or else the newest readable checkpoint. Nothing is unpickled. Raises
    `FileNotFoundError` where there is no model, `ValueError` for a damaged or foreign file or weights that do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}; give a model's folder or its {MODEL_FILE}.")
    if path.is_file():
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
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no safetensors file. Models of scoresde are folders with {MODEL_FILE}; pickled checkpoints are "
            "not opened here, since a pickle can run code."
        )
    tensors, config = read_tensors(path)
    if config is None:
        raise ValueError(f"{path} carries no scoresde configuration in its header; it was written by another program.")
    model = build(config, str(path))
    learned = dict(model.named_parameters())
    kinds = {v.dtype for k, v in tensors.items() if k in learned}
    if len(kinds) == 1:
        model.to(kinds.pop())
    load_weights(model, tensors, str(path))
    return model.eval()


def load_weights(module: torch.nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into the module; `ValueError` with a strict report of missing, extra and misshapen entries."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{k}: file {tuple(tensors[k].shape)}, model {tuple(own[k].shape)}"
        for k in sorted(own.keys() & tensors.keys())
        if own[k].shape != tensors[k].shape
    ]
    if missing or extra or shapes:
        parts = [
            f"{name}: {', '.join(items[:6])}{', ...' if len(items) > 6 else ''}"
            for name, items in (("missing", missing), ("not in the model", extra), ("of another shape", shapes))
            if items
        ]
        raise ValueError(f"the weights in {source} do not fit the model they describe; {'; '.join(parts)}.")
    module.load_state_dict(tensors)
