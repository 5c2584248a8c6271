"""Reading other people's files: tensors without code, options from where they were written. Layer 4."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What a `torch.save` file holds, with `weights_only=True`: tensors, numbers, strings and their containers.

    One thing more is allowed, a NumPy scalar, because score_sde_pytorch's optimizer states hold one (the learning rate of
    its warm-up). Raises `FileNotFoundError`, and `ValueError` for a truncated file or one with code in it, of which nothing
    is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with torch.serialization.safe_globals(_numpy_scalar()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about dtypes of old NumPy
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if "Unsupported operand" not in str(e):  # which is what bytes of another kind of file give
            raise ValueError(
                f"{path} holds more than tensors and was refused; nothing in it was executed. Ask its author for a file of "
                f"plain tensors (a state dict). The first thing refused: {_first_line(e)}"
            ) from e
        raise ValueError(_damaged(path, e)) from e
    except Exception as e:  # damaged bytes fail in many ways: struct.error, IndexError, RuntimeError, ...
        raise ValueError(_damaged(path, e)) from e


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} is not a readable PyTorch file ({_first_line(error)}); it is truncated or damaged, or a pickle of another "
        "program. Nothing in it was executed."
    )


def _first_line(error: Exception) -> str:
    text = str(error)
    for start in ("GLOBAL", "WeightsUnpickler error: "):  # what was refused, out of torch's long advice
        if start in text:
            text = text[text.index(start) :].removeprefix("WeightsUnpickler error: ")
    return (text.strip() or type(error).__name__).splitlines()[0][:200]


def _numpy_scalar() -> list[Any]:
    """The globals by which a float64 scalar of NumPy is pickled, by today's and by yesterday's name."""
    import numpy as np

    core = np._core if hasattr(np, "_core") else np.core
    scalar = core.multiarray.scalar
    return [
        np.dtype,
        np.dtypes.Float64DType,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]


def read_config(config: Any, names: Mapping[str, Callable[[], dict] | dict] | None = None) -> dict[str, Any]:
    """The options of a checkpoint as a dict: from a mapping, a JSON or YAML file, an object with `to_dict`, or one of `names`.

    Raises `ValueError` for an unknown name, a file of another kind (Python files are not executed) or one that holds no
    mapping, `TypeError` for other objects.
    """
    if isinstance(config, Mapping):
        return {k: read_config(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    if hasattr(config, "to_dict"):  # ml_collections.ConfigDict
        return read_config(config.to_dict())
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(
            f"config must be a dict, a JSON or YAML file, or a published name, got {type(config).__name__}; "
            "convert it with dict(...)."
        )
    path = Path(config)
    if path.suffix in (".json", ".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no configuration file {path}.")
        try:
            if path.suffix == ".json":
                found = json.loads(path.read_text())
            else:
                import yaml

                found = yaml.safe_load(path.read_text())
        except Exception as e:  # of either parser
            raise ValueError(f"{path} is not a readable configuration: {_first_line(e)}.") from e
        if not isinstance(found, dict):
            raise ValueError(f"{path} must hold a mapping of options, got {type(found).__name__}.")
        return found
    name = str(config)
    if name.endswith(".py") and name.removesuffix(".py").removeprefix("configs/") not in (names or {}):
        raise ValueError(f"{name} is Python, which is not executed here; give its options as a dict or a JSON file.")
    name = name.removesuffix(".py").removeprefix("configs/")
    if name not in (names or {}):
        known = ", ".join(sorted(names or {})) or "none for this kind of checkpoint"
        raise ValueError(
            f"{name!r} is neither a configuration file (.json, .yaml) nor a published name; known: {known}."
        )
    return names[name]


class Weights:
    """A state dict that is used up: every tensor has to be taken exactly once, or be ignored by name."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str):
        self.left, self.source = dict(tensors), source
        self.missing: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, *names: str) -> Tensor:
        """The tensor of the first of these names that is there; an empty one, noted as missing, where none is."""
        for name in names:
            if name in self.left:
                return self.left.pop(name)
        self.missing.append(names[0])
        return torch.empty(0)

    def ignore(self, names: Iterable[str]) -> None:
        """Drop what the network does not need."""
        for name in names:
            self.left.pop(name, None)

    def fill(self, net: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Load `values`, by the network's own names, after checking names and shapes. Raises `ValueError` naming the file."""
        own = net.state_dict()
        shapes = [
            f"{k}: {tuple(v.shape)} where the configuration gives {tuple(own[k].shape)}"
            for k, v in values.items()
            if k in own and v.numel() and v.shape != own[k].shape
        ]
        absent = self.missing + [k for k in own if k not in values and not self.missing]
        parts = [
            f"{what}: {', '.join(items[:4])}{f' and {len(items) - 4} more' if len(items) > 4 else ''}"
            for what, items in (
                ("missing", absent),
                ("left over", list(self.left)),
                ("of another shape", shapes),
            )
            if items
        ]
        if parts:
            raise ValueError(
                f"the weights in {self.source} do not fit the network that its configuration describes; {'; '.join(parts)}. "
                "Check that the configuration is the checkpoint's own."
            )
        net.load_state_dict({k: v.to(own[k].dtype) for k, v in values.items()})
