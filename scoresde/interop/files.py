"""Reading other people's files: tensors without code, options from where they were written. Layer 4."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import pickle
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LOCK = threading.Lock()  # what may be unpickled is a setting of the whole process


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
        with _LOCK, torch.serialization.safe_globals(_absent(_numpy_scalar())):
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
    """The globals by which a float64 scalar of NumPy is pickled, by today's and by yesterday's name, for that use alone."""
    core = np._core if hasattr(np, "_core") else np.core

    def dtype(code: str, *flags: Any) -> np.dtype:
        if code not in ("f8", "<f8"):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype of {code!r}: only float64 scalars of NumPy are read")
        return np.dtype("<f8", False, True)  # a copy, which takes the byte order that its state says

    def scalar(kind: np.dtype, data: bytes) -> np.float64:
        return core.multiarray.scalar(kind, data)

    named = [(dtype, "numpy", "dtype"), (scalar, "numpy.core.multiarray", "scalar")]
    copy = types.FunctionType(scalar.__code__, globals(), "scalar", None, scalar.__closure__)
    named.append((copy, "numpy._core.multiarray", "scalar"))
    for function, module, name in named:
        function.__module__, function.__name__, function.__qualname__ = module, name, name
    return [*(f for f, _, _ in named), np.dtypes.Float64DType]


def _absent(wanted: list[Any]) -> list[Any]:
    """Those that the program has not allowed by itself, which would be taken away from it afterwards."""
    there = {
        f if isinstance(f, tuple) else (f, f"{f.__module__}.{f.__name__}")
        for f in torch.serialization.get_safe_globals()
    }
    names = {name for _, name in there}
    return [f for f in wanted if f"{f.__module__}.{f.__name__}" not in names]


@contextlib.contextmanager
def fitting(source: str) -> Iterator[None]:
    """Turns what goes wrong while weights and options are taken apart into a `ValueError` that names the file."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as e:
        raise ValueError(
            f"{source} and its configuration do not hold what their layout promises ({type(e).__name__}: {_first_line(e)}). "
            "Check that the file is whole and the configuration its own."
        ) from e


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
    names = names or {}
    name = str(config).removesuffix(".py").rpartition("configs/")[2]  # of a published file too, wherever it lies
    if name not in names:
        if str(config).endswith(".py"):
            raise ValueError(
                f"{config} is Python, which is not executed here; give its options as a dict or a JSON file."
            )
        near = difflib.get_close_matches(name, names, 3)
        known = ", ".join(near or sorted(names)) or "none for this kind of checkpoint"
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

    def check(self) -> None:
        """`ValueError` for what is no number or not finite."""
        for name, value in self.left.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                what = (
                    "not finite"
                    if isinstance(value, Tensor) and value.is_floating_point()
                    else "no floating-point tensor"
                )
                raise ValueError(f"{self.source}: {name} is {what}; the file is damaged, or its training diverged.")

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
