"""Models of the diffusers library: `UNet2DModel`, with skip blocks too (NCSN++), and `DiTTransformer2DModel`. Layer 4.

A pipeline's folder is read without the library: options from its JSON files, weights from safetensors (or from a `.bin` file,
with `weights_only=True`). The scheduler says which process the network was trained for; only its schedule is used:

| scheduler | SDE | label |
|---|---|---|
| DDPM, DDIM and the others with betas | `DiscreteVPSDE` of the same betas | step (N - 1) t |
| ScoreSdeVe, or a Fourier embedding | `VESDE` | ln sigma |
| FlowMatchEulerDiscrete | `RectifiedFlow` | N t |
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from scoresde.interop.diffusers.dit import blocks_differ, dit_from_config, dit_weights
from scoresde.interop.diffusers.schedules import process_of_scheduler
from scoresde.interop.diffusers.unet import unet_from_config, unet_weights
from scoresde.interop.files import Weights, fitting, read_config, read_torch
from scoresde.models.network import ScoreNet
from scoresde.sde import VESDE
from scoresde.store import as_path, read_tensors

COMPONENTS = (
    "unet_ema",
    "unet",
    "transformer_ema",
    "transformer",
)  # averaged weights first: they are what is published
STEM = "diffusion_pytorch_model"
# what the average of weights writes into the network's configuration
AVERAGE = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}


def load_diffusers(path: str | os.PathLike[str], config: Any = None) -> ScoreNet:
    """The model in a pipeline's folder, in that of its `unet` or `transformer`, of its training script, or a file of weights.

    Of a training script's output the finished pipeline is taken, or else the newest `checkpoint-N`; in a checkpoint the averaged
    weights (`unet_ema`), where there are any. Weights may be in one file or several with an index, in half precision too, which
    become float32; files in full precision go first.

    `config`: options of the scheduler, where the folder has none or others are wanted (dict or JSON file, as
    `scheduler_config.json`). Class-conditional networks take `cond` of class labels (B,). What `DiTTransformer2DModel` denoises
    are latents of an autoencoder, which is not loaded; a learned variance is left out. In evaluation mode, on the CPU.

    Raises `FileNotFoundError` where there is no model, `ValueError` for damaged files, files with code, classes and options that
    are not supported, and weights that do not fit the options.
    """
    path = as_path(path)
    folder = model_folder(path.parent if path.is_file() else path)
    options = {k: v for k, v in read_config(folder / "config.json").items() if k not in AVERAGE}
    whole = path.is_file() and not re.search(r"-\d{5}-of-\d{5}", path.name)
    tensors, source = (_read_part(path), str(path)) if whole else _read_weights(folder)
    fourier = options.get("time_embedding_type") == "fourier"
    scheduler = _scheduler(path, folder) if config is None else read_config(config)
    weights = Weights(tensors, source)
    weights.check()
    with fitting(source):
        net = _network(options.get("_class_name"), options, weights, folder)
        sde, parameterization, label = process_of_scheduler(scheduler, fourier, str(path))
        return ScoreNet(net, sde, parameterization, label=label, **data_of(options, isinstance(sde, VESDE))).eval()


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """(tensors, name of the file or index they are from): full precision before half, safetensors before pickles."""
    for variant in ("", ".fp16", ".bf16", ".non_ema"):
        for kind in ("safetensors", "bin"):
            file = folder / f"{STEM}{variant}.{kind}"
            if file.is_file():
                return _read_part(file), str(file)
            for index in (folder / f"{STEM}.{kind}.index{variant}.json", folder / f"{STEM}{variant}.{kind}.index.json"):
                if index.is_file():
                    return _read_parts(index), str(index)
    raise FileNotFoundError(
        f"{folder} has a config.json but none of {STEM}.safetensors, {STEM}.bin, or an index of parts of one."
    )


def _read_part(file: Path) -> dict[str, Tensor]:
    tensors = read_tensors(file, foreign=True)[0] if file.suffix == ".safetensors" else read_torch(file)
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise ValueError(f"{file} is no state dict: it should map names to tensors.")
    return tensors


def _read_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of an index, each from the file that it names, which lies beside it."""
    places = read_config(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) and Path(v).name == v for v in places.values()):
        raise ValueError(
            f"{index} is no index of weights: its weight_map should give the name of a file here for each tensor."
        )
    parts = {name: _read_part(index.parent / name) for name in sorted(set(places.values()))}
    missing = [k for k, v in places.items() if k not in parts[v]]
    if missing:
        raise ValueError(f"{index} names tensors that are not in its files: {', '.join(missing[:4])}.")
    return {k: parts[v][k] for k, v in places.items()}


def data_of(options: Mapping[str, Any], exploding: bool) -> dict[str, Any]:
    """What a network's options say of its data, as options of `ScoreNet`: images in [0, 1] for NCSN++, else in [-1, 1]; or
    latents, of which no levels are known."""
    pixels = "num_embeds_ada_norm" not in options
    centred = bool(options.get("center_input_sample", False)) or exploding
    size, channels = options.get("sample_size"), int(options.get("in_channels", 3))
    shape = (channels, *((size, size) if isinstance(size, int) else size)) if size else None
    return dict(
        sigma_data=(0.25 if centred else 0.5) if pixels else 1.0,
        event_shape=shape,
        levels=256 if pixels else None,
        value_range=(0.0, 1.0) if centred else (-1.0, 1.0),
    )


def _network(name: str | None, options: dict[str, Any], weights: Weights, folder: Path) -> nn.Module:
    if name == "Transformer2DModel" and options.get("norm_type") == "ada_norm_zero":
        name = "DiTTransformer2DModel"  # what files of that network were called before it had a class of its own
    net: nn.Module
    if name == "DiTTransformer2DModel":
        with weights.sketch():
            net = dit_from_config(options, blocks_differ(weights))
        values = dit_weights(net, weights)
    elif name == "UNet2DModel":
        with weights.sketch():
            net = unet_from_config(options, weights)
        values = dict(unet_weights(net, options, weights))
    else:
        raise ValueError(f"{folder} holds a {name}; supported are UNet2DModel and DiTTransformer2DModel.")
    return weights.fill(net, values)


def model_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of the network in a pipeline's folder. Raises `FileNotFoundError` without one."""
    path = as_path(path)
    for folder in (*(path / name for name in COMPONENTS), path):
        if _is_network(folder):
            return folder
    for checkpoint in _checkpoints(path):
        for folder in (checkpoint / name for name in COMPONENTS):
            if _is_network(folder):
                return folder
    raise FileNotFoundError(
        f"{path} holds no diffusers model (looked for config.json there, in {', '.join(COMPONENTS)}, and in checkpoint-N)."
    )


def _is_network(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def is_weights(path: Path) -> bool:
    """Whether a file lies beside the options of a network of diffusers."""
    return _is_network(path.parent) and "_class_name" in read_config(path.parent / "config.json")


def _checkpoints(path: Path) -> list[Path]:
    """What a training script has left, newest first."""
    found = [p for p in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,12}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]), reverse=True)


def is_diffusers(path: Path) -> bool:
    """Whether a folder is a pipeline of diffusers, one of its models, or what its training script writes."""
    if (path / "model_index.json").is_file():
        return True
    try:
        return "_class_name" in read_config(model_folder(path) / "config.json")
    except FileNotFoundError:
        return False


def _scheduler(path: Path, folder: Path) -> dict[str, Any] | None:
    """The options of the scheduler, beside the network or above it: a checkpoint's are in the training script's folder."""
    for place in (path, folder, *folder.parents[:2]):
        for file in (place / "scheduler" / "scheduler_config.json", place / "scheduler_config.json"):
            if file.is_file():
                return read_config(file)
    return None
