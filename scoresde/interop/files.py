"""Reading other people's files: tensors without code, options from where they were written. Layer 4."""

from __future__ import annotations

import contextlib
import difflib
import json
import mmap
import numbers
import os
import pickle
import re
import threading
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scoresde.store import as_path, check_regular, on_meta, real_like

CONFIG_BYTES = 16 * 2**20
STEPS = 100_000
_LOCK = threading.Lock()  # what may be unpickled is a setting of the whole process


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What a `torch.save` file holds, with `weights_only=True`: tensors, numbers, strings and their containers.

    One thing more is allowed, a NumPy scalar, because score_sde_pytorch's optimizer states hold one (the learning rate of
    its warm-up). Tensors are views of the file, read when they are used. Raises `FileNotFoundError`, and `ValueError` for a
    truncated file, one with code in it, of which nothing is executed, and one that would take more memory than it has bytes.
    """
    path = check_regular(as_path(path))
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            _check_archive(path)
        elif path.stat().st_size:
            with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content[:2] == b"PK":
                    raise ValueError("an archive without its directory")
                _check_text(content, path)
        with _LOCK, torch.serialization.safe_globals(_absent(_numpy_scalar())):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except RefusedFileError:
        raise
    except pickle.UnpicklingError as e:
        if "Unsupported operand" not in str(e):  # which is what bytes of another kind of file give
            raise ValueError(
                f"{path} holds more than tensors and was refused; nothing in it was executed. Ask its author for a file of "
                f"plain tensors (a state dict). The first thing refused: {_first_line(e)}"
            ) from e
        raise ValueError(_damaged(path, e)) from e
    except Exception as e:  # damaged bytes fail in many ways: struct.error, IndexError, RuntimeError, ...
        raise ValueError(_damaged(path, e)) from e
    _check_sizes(found, path)
    return found


class RefusedFileError(ValueError):
    """A file that would take more memory than its size allows for."""


def _check_archive(path: Path) -> None:
    """`torch.save` stores without compression: what is in an archive takes no more room than the archive."""
    with zipfile.ZipFile(path) as archive:
        entries, size = archive.infolist(), path.stat().st_size
    promised = sum(e.file_size for e in entries)
    if promised > size or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise RefusedFileError(
            f"{path} has {size:,} bytes and unpacks to {promised:,}, or is compressed, as no file of torch.save is. It was not "
            "unpacked. If it should be a checkpoint, unpack it and save its tensors again."
        )
    with zipfile.ZipFile(path) as archive:
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_text(archive.read(entry), path)


def _check_text(content: bytes | mmap.mmap, path: Path) -> None:
    """Of what torch lets a pickle call one thing makes memory out of a number."""
    if re.search(rb"c(__builtin__|builtins)\nbytearray\n", content):
        raise RefusedFileError(
            f"{path} holds more than tensors and was refused: a bytearray. Nothing in it was executed."
        )


def _check_sizes(found: Any, path: Path) -> None:
    """`ValueError` for tensors that are larger than the memory they stand on, or than the file can have held."""
    left, total, seen, todo = 8 * path.stat().st_size + 2**20, 0, set(), [found]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif isinstance(value, Tensor):
            plain = value.layout == torch.strided and not value.is_meta
            size = value.numel() * value.element_size()
            total += size
            if not plain or size > value.untyped_storage().nbytes() or total > left:
                raise RefusedFileError(
                    f"{path} holds a tensor of shape {tuple(value.shape)} that stands on less memory than it has entries, or "
                    "is sparse or without numbers; it was refused. Save plain, contiguous tensors."
                )


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

    named: list[tuple[Any, str, str]] = [(dtype, "numpy", "dtype"), (scalar, "numpy.core.multiarray", "scalar")]
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
    except ValueError as e:
        if source in str(e):
            raise
        raise ValueError(f"{source}: {e}") from e
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError) as e:
        raise ValueError(
            f"{source} and its configuration do not hold what their layout promises ({type(e).__name__}: {_first_line(e)}). "
            "Check that the file is whole and the configuration its own."
        ) from e


def read_config(config: Any, names: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
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
        if not path.exists():
            raise FileNotFoundError(f"there is no configuration file {path}.")
        if check_regular(path).stat().st_size > CONFIG_BYTES:
            raise ValueError(f"{path} is no configuration: it has more than {CONFIG_BYTES // 2**20} MiB.")
        try:
            text = path.read_text()
            found = json.loads(text) if path.suffix == ".json" else _read_yaml(text)
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


def _read_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Without aliases, by which a few hundred bytes can stand for more nodes than there is memory."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has aliases (*name), which are not read here; write the values out")
            return super().compose_node(parent, index)

    return yaml.load(text, Loader)


def step_count(value: Any, name: str) -> int:
    """A number of discrete noise levels, as an integer. `ValueError` unless it is a whole number from 2 to `STEPS`."""
    number: Any = value  # the class Real has none of int and <= for the type checker
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or number != int(number) or not 2 <= number <= STEPS:
        raise ValueError(f"{name} must be 2 to {STEPS:,}, a whole number, got {value!r}.")
    return int(number)


class Weights:
    """A state dict that is used up: every tensor has to be taken exactly once, or be ignored by name."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str):
        self.left, self.source, self.count = dict(tensors), source, len(tensors)
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

    def sketch(self) -> contextlib.AbstractContextManager[None]:
        """Where a network is made from options: without memory, and not much larger than these weights. See `fill`."""
        return on_meta(self.count)

    def fill(self, net: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
        """The network with `values`, by its own names, after checking names and shapes; a sketch becomes real only then.

        Values without numbers, of a sketch, are left as the network makes them. Raises `ValueError` naming the file.
        """
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
        if any(v.is_meta for v in own.values()):
            net = real_like(net)
            own = net.state_dict()
        net.load_state_dict({k: own[k] if v.is_meta else v.to(own[k].dtype) for k, v in values.items()})
        return net
