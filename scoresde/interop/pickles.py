"""Network snapshots (`.pkl`) of NVIDIA's EDM and EDM2, read without running anything that is in them.

Such a snapshot is a pickle of a dict: under 'ema' (or 'net') a network, beside it the loss, the augmentation or the
encoder, and the options of the data set. Every object of theirs carries the *source code* of its class, which their
own loader executes; and any pickle can name any function of Python to be called. Here neither happens. The file is
taken apart instruction by instruction (`pickletools`, which only decodes) and each instruction is carried out by this
module: what would be a call is looked up in a closed table of a few checked constructors, what would be an object of a
class becomes a `Record`, a plain description with the class's name, its constructor arguments and its attributes.
Whatever is not in the table is refused by name, in the file as well as in the bytes of the tensors inside it.

    record = network_of("edm-cifar10-32x32-uncond-vp.pkl")
    record.class_name, record.init_kwargs     # 'EDMPrecond', {'img_resolution': 32, ...}
    weights = record.state_dict()             # {'model.map_layer0.weight': tensor(...), ...}

Limits. Only weights and constructor arguments are recovered, not behaviour: the source code in the file is skipped
over and a `Record` cannot be called. Options are plain dicts, without attribute access. EDM2's networks have no
counterpart in this package; their weights are for a live network of your own, `net.load_state_dict(
record.state_dict())`, with `net` made from NVIDIA's code and `record.init_kwargs`. Pickle protocols 2 to 5, version 6
of NVIDIA's format, dense tensors and NumPy arrays of numbers in this machine's byte order are read, nothing else; a
network that keeps a function among its attributes (an activation, a hook) is refused with that function's name.
While a file is read it takes about twice its size in memory.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

PERSISTENT = "torch_utils.persistence"  # the module of theirs that writes the objects
VERSION = 6  # the only one the published snapshots of EDM and EDM2 have
NETWORK_KEYS = ("ema", "net")
_MAX_MODULES = 20_000  # a few hundred bytes can describe a network in which each part occurs 2^100 times
_MAX_DEPTH = 200


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class _RefusedError(ValueError):
    """The file asks for something that is not allowed, as opposed to being damaged."""


@dataclass(eq=False)  # two records with tensors in them have no useful equality
class Record:
    """An object of a snapshot: what it was made with and what it held, without the class that would make it work.

    `class_name` is the name of its class and `module` where the class is from: a module of `torch.nn.modules`, or
    `torch_utils.persistence` for classes whose source code is in the file. `init_args` and `init_kwargs` are the
    arguments of its constructor, empty where none were recorded (PyTorch's own layers have none). `state` holds its
    attributes under their names.
    """

    class_name: str
    module: str
    init_args: tuple[Any, ...] = ()
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_module(self) -> bool:
        """Whether this is the record of an `nn.Module`, which has a `state_dict`."""
        return all(isinstance(self.state.get(k), dict) for k in ("_parameters", "_buffers", "_modules"))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights and persistent buffers under the names, and in the order, of `nn.Module.state_dict`.

        The tensors share memory with those in `state` and are without gradient. Raises `ValueError` for the record of
        something that is no `nn.Module` (a loss, say), and for one that no `nn.Module` could have written.
        """
        found: dict[str, Tensor] = {}
        visits = 0
        todo: list[tuple[Record, str, tuple[int, ...]]] = [(self, "", ())]
        while todo:
            record, prefix, above = todo.pop()
            where = f"{self.class_name}{'.' + prefix[:-1] if prefix else ''}"
            if not record.is_module:
                raise ValueError(
                    f"{where} ({record.class_name}) is not the record of an nn.Module: it has no parameters, buffers "
                    "and submodules. Take the network's record, see network_of."
                )
            visits += 1
            if id(record) in above or len(above) > _MAX_DEPTH or visits > _MAX_MODULES:
                raise ValueError(
                    f"{where} contains itself or is nested without end (over {_MAX_DEPTH} levels or {_MAX_MODULES} "
                    "modules); no network is. The file is damaged or made to do harm: get it from its first source."
                )
            for name, tensor in record._tensors():
                if prefix + name in found:
                    raise ValueError(f"{where} has two tensors of the name {prefix + name!r}; the file is damaged.")
                found[prefix + name] = tensor.detach()
            children = []
            for name, child in record.state["_modules"].items():
                if child is None:
                    continue
                if type(name) is not str or not isinstance(child, Record):
                    raise ValueError(f"{where} holds a {type(child).__name__} among its modules; the file is damaged.")
                children.append((child, f"{prefix}{name}.", (*above, id(record))))
            todo += reversed(children)
        return found

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        hidden = self.state.get("_non_persistent_buffers_set", set())  # PyTorch before 1.6 has none
        if not isinstance(hidden, set):
            raise ValueError(f"{self.class_name} lists its temporary buffers in no set; the file is damaged.")
        for kind, left_out in (("_parameters", set()), ("_buffers", hidden)):
            for name, tensor in self.state[kind].items():
                if tensor is None or name in left_out:
                    continue
                if type(name) is not str or not isinstance(tensor, Tensor):
                    raise ValueError(
                        f"{self.class_name} holds a {type(tensor).__name__} in {kind}, where a tensor is expected; "
                        "the file is damaged or was written by another program."
                    )
                yield name, tensor


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a snapshot: its dict, with a `Record` for each object in it.

    Numbers, strings, containers, tensors (on the CPU) and arrays are what they were; a class among the options, such
    as a layer of PyTorch, remains a token with its name. Nothing in the file is executed, whatever it contains. Raises
    `FileNotFoundError` where there is no file and `ValueError` for a file that asks for anything but the contents of
    such a snapshot (naming it), for a damaged or truncated one and for other formats.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give the path of a downloaded .pkl of EDM or EDM2.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of the .pkl file in it.")
    with open(path, "rb") as f:
        _look_at_start(f.read(64), path)
        f.seek(0)
        source = _Source(f, os.fstat(f.fileno()).st_size)
        try:
            content = _Machine(source).load()
        except _RefusedError as e:
            raise ValueError(
                f"{path} was refused at byte {source.tell()}: {e} Nothing in it was executed. If it should be a "
                "snapshot of EDM or EDM2, get it from its first source; do not open it with pickle.load."
            ) from e
        except OSError:
            raise
        except (
            Exception
        ) as e:  # what bytes at random can raise has no end: KeyError, RuntimeError of torch, MemoryError
            raise ValueError(
                f"{path} is truncated or damaged: reading ended at byte {source.tell()} of {source.size} "
                f"({type(e).__name__}: {_shown(str(e), 300)}). Nothing in it was executed. Get the file again and "
                "compare its size with the original's."
            ) from e
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {_described(content)}, not a dict with a network; it is no snapshot of EDM or EDM2."
        )
    return content


def network_of(path: str | os.PathLike[str], key: str | None = None) -> Record:
    """The network in a snapshot: the one under `key`, without it the one under 'ema' or else 'net'.

    Raises what `read_pickle` raises, and `ValueError` listing what the file holds where there is no network.
    """
    content = read_pickle(path)
    for k in NETWORK_KEYS if key is None else (key,):
        found = content.get(k)
        if isinstance(found, Record) and found.is_module:
            return found
    wanted = " or ".join(map(repr, NETWORK_KEYS if key is None else (key,)))
    present = ", ".join(f"{_shown(repr(k))} (a {_described(v)})" for k, v in list(content.items())[:30])
    raise ValueError(
        f"{path} has no network under {wanted}; it holds {present or 'nothing'}. Give the key of the network, key=..., "
        "or another file."
    )


def _look_at_start(start: bytes, path: Path) -> None:
    """Say what a file is that is no pickle, where its first bytes tell."""
    if len(start) >= 2 and start[0] == 0x80 and 2 <= start[1] <= 5:
        return
    if not start:
        what = "is empty; get it again"
    elif start.startswith(b"PK"):
        what = "is a zip archive, as torch.save writes them: try scoresde.load, or torch.load(..., weights_only=True)"
    elif start.startswith(b"version https://git-lfs"):
        what = "is a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    elif start.startswith(b"\x1f\x8b"):
        what = "is compressed by gzip; unpack it first"
    elif start.lstrip().startswith(b"<"):
        what = "is a web page or XML, likely the error page of a download; get it again"
    else:
        what = "does not start like a pickle of protocol 2 to 5, which snapshots of EDM and EDM2 are"
    raise ValueError(f"{path} {what}. Nothing in it was executed.")


def _shown(text: str, limit: int = 120) -> str:
    """Text of the file for a message: cut off, and without characters that steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit]) + ("..." if text[limit:] else "")


def _described(value: Any) -> str:
    if isinstance(value, _Global):
        return f"reference to {value.name}"
    return value.class_name if isinstance(value, Record) else type(value).__name__


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise _RefusedError(what)


# ---------------------------------------------------------------------------------------------------------------------
# The closed table: what may stand for a name in the file. Every function here gets the arguments as they were in the
# file and answers with a value it made itself; none passes on a name, looks up an attribute or calls an argument.


@dataclass(frozen=True, eq=False)
class _Global:
    """A name in the file: no function or class, only a token the machine knows. It cannot be called."""

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = field(default=None, repr=False)
    new: Callable[[], Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class _Storage:
    dtype: torch.dtype
    untyped: Any


_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
    + (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
}
_NUMPY_CODES = _words("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16")
_PLAIN = (str, int, float, bool, type(None), bytes)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _counts(value: Any) -> bool:
    return type(value) in (tuple, torch.Size) and len(value) <= 64 and all(map(_count, value))


def _hashable(value: Any) -> bool:
    # Nothing deeper than a flat tuple: hashing a tuple nested a million times would overflow the interpreter's stack.
    return type(value) in _PLAIN or (type(value) is tuple and all(type(v) in _PLAIN for v in value))


def _persistent(args: tuple[Any, ...]) -> Record:
    """A persistent object; the source code among its fields is looked at for its type only, and dropped."""
    _need(len(args) == 1 and isinstance(args[0], dict), "a persistent object does not consist of one dict of fields.")
    meta = args[0]
    kind, version, name = meta.get("type"), meta.get("version"), meta.get("class_name")
    _need(type(kind) is str and kind == "class", "a persistent object is not of the type 'class'.")
    known = type(version) is int and version == VERSION
    _need(known, f"a persistent object is not of version {VERSION} of NVIDIA's format, the one that is read here.")
    _need(type(name) is str and name.isidentifier(), "a persistent object has no proper class name.")
    _need(type(meta.get("module_src")) is str, f"the persistent object {_shown(name)} carries no source text.")
    state = _attributes({} if meta.get("state") is None else meta["state"])
    init_args, init_kwargs = state.get("_init_args"), state.get("_init_kwargs")
    proper = type(init_args) in (tuple, type(None)) and (init_kwargs is None or isinstance(init_kwargs, dict))
    _need(proper, f"the constructor arguments of {_shown(name)} are not a tuple and a dict.")
    return Record(name, PERSISTENT, init_args or (), {} if init_kwargs is None else init_kwargs, state)


def _attributes(state: Any) -> dict[str, Any]:
    """An object's attributes, checked. A Record keeps them in a dict, so no name in it can change what a Record does;
    special names are refused all the same, since no network has them and whoever writes them is up to something."""
    _need(isinstance(state, dict), f"an object's attributes are a {type(state).__name__}, not a dict.")
    for name in state:
        special = type(name) is not str or (name.startswith("__") and name.endswith("__"))
        _need(not special, f"it sets the attribute {_shown(repr(name))} of an object.")
    return state


_STORAGE_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number torch.save's older format has
_STORAGE_OPCODES = _words(
    "PROTO STOP LONG1 BININT BININT1 BININT2 BINUNICODE NONE NEWTRUE NEWFALSE EMPTY_DICT SETITEM SETITEMS EMPTY_LIST "
    "APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 MARK BINPUT BINGET GLOBAL BINPERSID"
)


def _load_storage(args: tuple[Any, ...]) -> _Storage:
    """A tensor's memory, a whole file of torch.save within the file.

    PyTorch's restricted loader reads it. Before that its own pickles are gone through, so that what is hidden there is
    named like anything else, and so that what a program has declared safe for torch.load elsewhere is not open here.
    """
    _need(len(args) == 1 and type(args[0]) is bytes, "a tensor's memory is not given as bytes.")
    data: bytes = args[0]
    _need(data.startswith(_STORAGE_START), "a tensor's memory is not in the format of torch.save that snapshots use.")
    stream = io.BytesIO(data)
    for _ in range(5):  # the number, the version, the machine, the storage, the list of storages
        names = []
        for opcode, arg, _ in pickletools.genops(stream):
            names.append(opcode.name)
            if opcode.name == "GLOBAL":
                named = re.fullmatch(r"torch [A-Z][A-Za-z0-9]*Storage", arg)
                _need(named is not None, f"the bytes of a tensor name {_shown(arg.replace(' ', '.'))}.")
            _need(opcode.name in _STORAGE_OPCODES, f"the bytes of a tensor have the instruction {opcode.name}.")
            _need(opcode.name != "PROTO" or arg == 2, "the bytes of a tensor are pickles of another protocol than 2.")
    size = len(data) - stream.tell() - 8  # eight bytes repeat the number of elements
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True, mmap=False)
    _need(type(loaded) is torch.storage.TypedStorage, "the bytes of a tensor do not hold a tensor's memory.")
    _need(loaded.dtype in _DTYPES.values(), f"a tensor is of the type {loaded.dtype}, which is not read here.")
    untyped = loaded._untyped_storage  # untyped() is the same with a warning
    # A storage that is missing from the list would be left as it was allocated, with what this memory held before.
    _need("APPEND" in names and untyped.nbytes() == size, "a tensor's memory is not of the size that it states.")
    return _Storage(loaded.dtype, untyped)


def _tensor(args: tuple[Any, ...]) -> Tensor:
    _need(len(args) in (6, 7), "a tensor has an unexpected number of fields.")
    storage, offset, size, stride, requires_grad, hooks = args[:6]
    proper = type(storage) is _Storage and _count(offset) and _counts(size) and _counts(stride)
    _need(proper and len(size) == len(stride), "a tensor's memory, offset, size and strides do not fit together.")
    _need(type(requires_grad) is bool, "a tensor does not say whether it requires a gradient.")
    _need(isinstance(hooks, dict) and not hooks, "a tensor carries hooks.")
    _need(all(type(a) in (dict, type(None)) and not a for a in args[6:]), "a tensor carries more than its values.")
    # Checked here because set_ enlarges a memory that is too small for the size asked for.
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    fits = 0 in size or last < storage.untyped.nbytes() // storage.dtype.itemsize
    _need(fits and math.prod(size) < 2**62, "a tensor reaches beyond its memory.")
    tensor = torch.empty(0, dtype=storage.dtype, device="cpu")  # whatever the default device is
    if 0 in size:
        tensor = tensor.reshape(size)
    else:
        tensor.set_(storage.untyped, offset, size, stride)
    return tensor.requires_grad_(requires_grad)


def _parameter(args: tuple[Any, ...]) -> Tensor:
    _need(len(args) == 3 and type(args[0]) is Tensor and type(args[1]) is bool, "a parameter is not made of a tensor.")
    _need(isinstance(args[2], dict) and not args[2], "a parameter carries hooks.")
    return torch.nn.Parameter(args[0].detach(), args[1])


def _device(args: tuple[Any, ...]) -> torch.device:
    kind, index = (*args, None)[:2]
    proper = len(args) in (1, 2) and type(kind) is str and re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", kind) is not None
    _need(proper and (index is None or (_count(index) and index < 1000)), "a device is not given by its name.")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _size(args: tuple[Any, ...]) -> torch.Size:
    _need(len(args) == 1 and _counts(args[0]), "a torch.Size is not made of whole numbers.")
    return torch.Size(args[0])


def _numpy_dtype(args: tuple[Any, ...]) -> np.dtype:
    code = args[0] if args else None
    _need(type(code) is str and code in _NUMPY_CODES, "an array of NumPy is of a type that is not numeric.")
    return np.dtype(code)


def _numpy_empty(args: tuple[Any, ...]) -> np.ndarray:
    proper = len(args) == 3 and args[0] is _NDARRAY and args[1:] == ((0,), b"b")
    _need(proper, "an array of NumPy does not start out as an empty one.")
    return np.ndarray((0,), dtype=np.int8)


def _numpy_fill(array: np.ndarray, state: Any) -> None:
    """What follows an empty array: its shape, type, order and bytes."""
    _need(type(state) is tuple and len(state) == 5, "an array of NumPy has an unexpected number of fields.")
    version, shape, dtype, fortran, data = state
    _need(type(version) is int and version == 1, "an array of NumPy is of an unknown version of its format.")
    _need(type(fortran) in (bool, int) and _fits(shape, dtype, data), "an array of NumPy does not fit its bytes.")
    array.__setstate__((1, shape, dtype, bool(fortran), data))


def _numpy_from(args: tuple[Any, ...]) -> np.ndarray:
    """How protocol 5 stores an array."""
    _need(len(args) in (4, 5), "an array of NumPy has an unexpected number of fields.")
    data, dtype, shape, order, axes = (*args, None)[:5]
    data = bytes(data) if type(data) is bytearray else data
    _need(_fits(shape, dtype, data), "an array of NumPy does not fit its bytes.")
    proper = type(order) is str and order in ("C", "F", "K") and (axes is None or _counts(axes))
    _need(proper and (axes is not None or order != "K"), "an array of NumPy has its axes in an unknown order.")
    flat = np.zeros(0, dtype) if not data else np.frombuffer(data, dtype).copy()
    return flat.reshape(shape, order="C").transpose(axes) if order == "K" else flat.reshape(shape, order=order)


def _numpy_scalar(args: tuple[Any, ...]) -> Any:
    _need(len(args) == 2 and _fits((), *args), "a number of NumPy does not fit its bytes.")
    return np.frombuffer(args[1], args[0])[0]


def _fits(shape: Any, dtype: Any, data: Any) -> bool:
    proper = _counts(shape) and isinstance(dtype, np.dtype) and type(data) is bytes
    return proper and dtype.str[1:] in _NUMPY_CODES and math.prod(shape) * dtype.itemsize == len(data)


def _check_byte_order(dtype: np.dtype, state: Any) -> None:
    """What follows a numeric type: the byte order, and fields only other types have. The type is already right."""
    proper = type(state) is tuple and len(state) == 8 and type(state[0]) is int and type(state[1]) is str
    _need(proper and all(v is None for v in state[2:5]), "an array of NumPy is of a type that is not numeric.")
    here = "<" if sys.byteorder == "little" else ">"
    _need(
        state[1] in ("|", "=", here), f"an array of NumPy has the byte order {_shown(state[1])!r}, not this machine's."
    )


def _encoded(args: tuple[Any, ...]) -> bytes:
    """Bytes in protocol 2, which stores them as text."""
    proper = len(args) == 2 and all(type(a) is str for a in args) and args[1] in ("latin1", "latin-1")
    _need(proper, "bytes are not stored as Latin-1 text.")
    return args[0].encode("latin-1")


def _no_bytes(args: tuple[Any, ...]) -> bytes:
    _need(args == (), "bytes are made from something.")
    return b""


def _bytearray(args: tuple[Any, ...]) -> bytearray:
    if len(args) == 1 and type(args[0]) is bytes:
        return bytearray(args[0])
    return bytearray(_encoded(args) if args else b"")


def _set(args: tuple[Any, ...]) -> set[Any]:
    _need(len(args) in (0, 1) and all(type(a) is list for a in args), "a set is not made from a list.")
    return _set_of(args[0] if args else [])


def _frozenset(args: tuple[Any, ...]) -> frozenset[Any]:
    return frozenset(_set(args))


def _set_of(items: list[Any]) -> set[Any]:
    _need(all(map(_hashable, items)), "a set has members other than numbers and text.")
    return set(items)


def _ordered(args: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    _need(args == (), "an OrderedDict is made from something.")
    return OrderedDict()


def _easy_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    _need(args == (), "an EasyDict is made from something.")
    return {}


_NDARRAY = _Global("numpy.ndarray")
_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    f"{PERSISTENT}._reconstruct_persistent_obj": _persistent,
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _encoded,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _load_storage,
    "torch.device": _device,
    "torch.Size": _size,
    "numpy.dtype": _numpy_dtype,
}
for _module in ("builtins", "__builtin__"):  # the latter in protocol 2
    _CALLS |= {f"{_module}.set": _set, f"{_module}.frozenset": _frozenset}
    _CALLS |= {f"{_module}.bytes": _no_bytes, f"{_module}.bytearray": _bytearray}
for _module in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _CALLS |= {f"{_module}.multiarray._reconstruct": _numpy_empty, f"{_module}.multiarray.scalar": _numpy_scalar}
    _CALLS |= {f"{_module}.numeric._frombuffer": _numpy_from}
_GLOBALS: dict[str, Any] = {name: _Global(name, call=call) for name, call in _CALLS.items()}
_GLOBALS |= {f"torch.{name}": dtype for name, dtype in _DTYPES.items()}
_GLOBALS["numpy.ndarray"] = _NDARRAY
for _name in ("dnnlib.util.EasyDict", "dnnlib.EasyDict"):
    _GLOBALS[_name] = _Global(_name, call=_easy_dict, new=dict)


# ---------------------------------------------------------------------------------------------------------------------
# The machine: the instructions of a pickle. `pickle.Unpickler` with a `find_class` of one's own would not do. It still
# sets attributes on, extends and calls whatever is on its stack, and takes what `copyreg` has registered unasked.


class _Source:
    """A file that does not read beyond its end: a length in a damaged file may ask for more memory than there is."""

    def __init__(self, stream: BinaryIO, size: int):
        self.stream, self.size, self.tell = stream, size, stream.tell

    def read(self, n: int) -> bytes:
        if n > self.size - self.stream.tell():
            raise EOFError("the file ends in the middle of a value")
        return self.stream.read(n)

    def readline(self) -> bytes:
        return self.stream.readline(1000)  # of the instructions allowed only names are lines


_VALUES = _words(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 BYTEARRAY8"
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CONTAINERS: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and the memo of a pickle, with every instruction that is not needed left out."""

    def __init__(self, source: _Source):
        self.source = source
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        self.unfilled: dict[int, Any] = {}  # objects whose attributes are yet to come, by id

    def load(self) -> Any:
        for opcode, arg, _ in pickletools.genops(self.source):  # type: ignore[arg-type]
            name, stack = opcode.name, self.stack
            if name in _VALUES:
                stack.append(arg)
            elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                self.memo[len(self.memo) if name == "MEMOIZE" else arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(self.memo[arg])
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _CONTAINERS:
                stack.append(_CONTAINERS[name]())
            elif name in _TUPLES:
                stack.append(tuple(self.take(_TUPLES[name])))
            elif name == "MARK":
                self.below.append(stack)
                self.stack = []
            elif name in ("TUPLE", "FROZENSET"):
                items = self.take_to_mark()
                self.stack.append(tuple(items) if name == "TUPLE" else frozenset(_set_of(items)))
            elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
                items = self.take({"APPEND": 1, "SETITEM": 2}[name]) if name[-1] != "S" else self.take_to_mark()
                self.extend(name, items)
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                module, attribute = arg.split(" ", 1) if name == "GLOBAL" else self.take(2)
                self.stack.append(self.find_class(module, attribute))
            elif name in ("REDUCE", "NEWOBJ"):
                token, args = self.take(2)
                self.stack.append(self.make(name, token, args))
            elif name == "BUILD":
                self.fill(*self.take(1))
            elif name == "POP":  # this one and the next follow a tuple that contains itself
                stack.pop()
            elif name == "POP_MARK":
                self.take_to_mark()
            elif name == "PROTO":
                _need(2 <= arg <= 5, f"it is a pickle of protocol {arg}; 2 to 5 are read.")
            elif name == "STOP":
                if self.below or len(stack) != 1:
                    raise ValueError("the pickle ends in the middle of an object")
            else:
                _need(name == "FRAME", f"it has the instruction {name}, which no snapshot needs.")
        return self.stack[0]

    def take(self, n: int) -> list[Any]:
        if len(self.stack) < n:
            raise ValueError("an instruction lacks its operands")
        taken = self.stack[-n:]
        del self.stack[-n:]
        return taken

    def take_to_mark(self) -> list[Any]:
        taken = self.stack
        self.stack = self.below.pop()
        return taken

    def find_class(self, module: Any, name: Any) -> Any:
        """The stand-in for a name of the file; the name is compared, never looked up or imported."""
        _need(type(module) is str and type(name) is str, "a name of a class or function is not text.")
        full = f"{module}.{name}"
        # The joined name alone would let one split at another point pass: harmless, but not what was written.
        if full in _GLOBALS and "." not in name:
            return _GLOBALS[full]
        layer = re.fullmatch(r"torch\.nn\.modules(\.[a-z_0-9]+)+", module) and re.fullmatch(r"_*[A-Z]\w*", name, re.A)
        _need(bool(layer), f"it names {_shown(full)}, which is not among the few classes and functions of a snapshot.")
        return _Global(full, new=lambda: Record(name, module))

    def make(self, opcode: str, token: Any, args: Any) -> Any:
        _need(type(token) is _Global, f"it calls or makes an object of a {_described(token)}.")
        _need(type(args) is tuple, f"it calls {token.name} with a {type(args).__name__}, not a tuple.")
        if opcode == "REDUCE":
            _need(token.call is not None, f"it calls {token.name}, which snapshots do not.")
            made = token.call(args)
        else:
            _need(token.new is not None and args == (), f"it makes a {token.name} in a way that snapshots do not.")
            made = token.new()
        if token.call in (_numpy_empty, _numpy_dtype) or (token.call is None and isinstance(made, Record)):
            self.unfilled[id(made)] = made
        return made

    def fill(self, state: Any) -> None:
        """The attributes of the object on top of the stack. Only what was just made may get any, and only once."""
        target = self.stack[-1]
        if isinstance(target, np.dtype) and id(target) in self.unfilled:  # one object for all arrays of the type
            _check_byte_order(target, state)
            return
        _need(self.unfilled.pop(id(target), self) is target, f"it sets attributes of a {_described(target)}.")
        if isinstance(target, Record):
            target.state = _attributes(state)
        else:
            _numpy_fill(target, state)

    def extend(self, opcode: str, items: list[Any]) -> None:
        """Items for the container on top of the stack, which has to be one of Python's own."""
        target = self.stack[-1]
        if opcode.startswith("APPEND"):
            _need(type(target) is list, f"it appends to a {_described(target)}.")
            target.extend(items)
        elif opcode == "ADDITEMS":
            _need(type(target) is set, f"it adds to a {_described(target)}.")
            target |= _set_of(items)
        else:
            _need(type(target) in (dict, OrderedDict), f"it sets items of a {_described(target)}.")
            _need(all(map(_hashable, items[::2])), "a dict has keys other than numbers and text.")
            target.update(zip(items[::2], items[1::2], strict=True))
