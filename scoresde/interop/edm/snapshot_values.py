"""What a snapshot of EDM may hold, each made here and checked: records, tensors, plain values. See `snapshot`."""

from __future__ import annotations

import io
import math
import pickletools
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

PERSISTENT = "torch_utils.persistence"  # the module of theirs that writes the objects
VERSION = 6  # the only one the published snapshots of EDM and EDM2 have
_MAX_MODULES = 20_000  # a few hundred bytes can describe a network in which each part occurs 2^100 times
_MAX_DEPTH = 200


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class RefusedError(ValueError):
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


def shown(text: str, limit: int = 120) -> str:
    """Text of the file for a message: cut off, and without characters that steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit]) + ("..." if text[limit:] else "")


def described(value: Any) -> str:
    if isinstance(value, Global):
        return f"reference to {value.name}"
    return value.class_name if isinstance(value, Record) else type(value).__name__


def need(condition: bool, what: str) -> None:
    if not condition:
        raise RefusedError(what)


# ---------------------------------------------------------------------------------------------------------------------
# The closed table: what may stand for a name in the file. Every function here gets the arguments as they were in the
# file and answers with a value it made itself; none passes on a name, looks up an attribute or calls an argument.


@dataclass(frozen=True, eq=False)
class Global:
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
_NUMPY_CODES = words("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16")
_PLAIN = (str, int, float, bool, type(None), bytes)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _counts(value: Any) -> bool:
    return type(value) in (tuple, torch.Size) and len(value) <= 64 and all(map(_count, value))


def hashable(value: Any) -> bool:
    # Nothing deeper than a flat tuple: hashing a tuple nested a million times would overflow the interpreter's stack.
    return type(value) in _PLAIN or (type(value) is tuple and all(type(v) in _PLAIN for v in value))


def _persistent(args: tuple[Any, ...]) -> Record:
    """A persistent object; the source code among its fields is looked at for its type only, and dropped."""
    need(len(args) == 1 and isinstance(args[0], dict), "a persistent object does not consist of one dict of fields.")
    meta = args[0]
    kind, version, name = meta.get("type"), meta.get("version"), meta.get("class_name")
    need(type(kind) is str and kind == "class", "a persistent object is not of the type 'class'.")
    known = type(version) is int and version == VERSION
    need(known, f"a persistent object is not of version {VERSION} of NVIDIA's format, the one that is read here.")
    need(type(name) is str and name.isidentifier(), "a persistent object has no proper class name.")
    need(type(meta.get("module_src")) is str, f"the persistent object {shown(name)} carries no source text.")
    state = attributes_of({} if meta.get("state") is None else meta["state"])
    init_args, init_kwargs = state.get("_init_args"), state.get("_init_kwargs")
    proper = type(init_args) in (tuple, type(None)) and (init_kwargs is None or isinstance(init_kwargs, dict))
    need(proper, f"the constructor arguments of {shown(name)} are not a tuple and a dict.")
    return Record(name, PERSISTENT, init_args or (), {} if init_kwargs is None else init_kwargs, state)


def attributes_of(state: Any) -> dict[str, Any]:
    """An object's attributes, checked. A Record keeps them in a dict, so no name in it can change what a Record does;
    special names are refused all the same, since no network has them and whoever writes them is up to something."""
    need(isinstance(state, dict), f"an object's attributes are a {type(state).__name__}, not a dict.")
    for name in state:
        special = type(name) is not str or (name.startswith("__") and name.endswith("__"))
        need(not special, f"it sets the attribute {shown(repr(name))} of an object.")
    return state


_STORAGE_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number torch.save's older format has
_STORAGE_OPCODES = words(
    "PROTO STOP LONG1 BININT BININT1 BININT2 BINUNICODE NONE NEWTRUE NEWFALSE EMPTY_DICT SETITEM SETITEMS EMPTY_LIST "
    "APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 MARK BINPUT BINGET GLOBAL BINPERSID"
)


def _load_storage(args: tuple[Any, ...]) -> _Storage:
    """A tensor's memory, a whole file of torch.save within the file.

    PyTorch's restricted loader reads it. Before that its own pickles are gone through, so that what is hidden there is
    named like anything else, and so that what a program has declared safe for torch.load elsewhere is not open here.
    """
    need(len(args) == 1 and type(args[0]) is bytes, "a tensor's memory is not given as bytes.")
    data: bytes = args[0]
    need(data.startswith(_STORAGE_START), "a tensor's memory is not in the format of torch.save that snapshots use.")
    stream = io.BytesIO(data)
    for _ in range(5):  # the number, the version, the machine, the storage, the list of storages
        names = []
        arg: Any
        for opcode, arg, _ in pickletools.genops(stream):
            names.append(opcode.name)
            if opcode.name == "GLOBAL":
                named = re.fullmatch(r"torch [A-Z][A-Za-z0-9]*Storage", arg)
                need(named is not None, f"the bytes of a tensor name {shown(arg.replace(' ', '.'))}.")
            need(opcode.name in _STORAGE_OPCODES, f"the bytes of a tensor have the instruction {opcode.name}.")
            need(opcode.name != "PROTO" or arg == 2, "the bytes of a tensor are pickles of another protocol than 2.")
    size = len(data) - stream.tell() - 8  # eight bytes repeat the number of elements
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True, mmap=False)
    need(type(loaded) is torch.storage.TypedStorage, "the bytes of a tensor do not hold a tensor's memory.")
    need(loaded.dtype in _DTYPES.values(), f"a tensor is of the type {loaded.dtype}, which is not read here.")
    untyped = loaded._untyped_storage  # untyped() is the same with a warning
    # A storage that is missing from the list would be left as it was allocated, with what this memory held before.
    need("APPEND" in names and untyped.nbytes() == size, "a tensor's memory is not of the size that it states.")
    return _Storage(loaded.dtype, untyped)


def _tensor(args: tuple[Any, ...]) -> Tensor:
    need(len(args) in (6, 7), "a tensor has an unexpected number of fields.")
    storage, offset, size, stride, requires_grad, hooks = args[:6]
    proper = type(storage) is _Storage and _count(offset) and _counts(size) and _counts(stride)
    need(proper and len(size) == len(stride), "a tensor's memory, offset, size and strides do not fit together.")
    need(type(requires_grad) is bool, "a tensor does not say whether it requires a gradient.")
    need(isinstance(hooks, dict) and not hooks, "a tensor carries hooks.")
    need(all(type(a) in (dict, type(None)) and not a for a in args[6:]), "a tensor carries more than its values.")
    # Checked here because set_ enlarges a memory that is too small for the size asked for.
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    fits = 0 in size or last < storage.untyped.nbytes() // storage.dtype.itemsize
    entries = storage.untyped.nbytes() // storage.dtype.itemsize
    need(fits and math.prod(size) <= entries, "a tensor reaches beyond its memory, or has more entries than that.")
    tensor = torch.empty(0, dtype=storage.dtype, device="cpu")  # whatever the default device is
    if 0 in size:
        tensor = tensor.reshape(size)
    else:
        tensor.set_(storage.untyped, offset, size, stride)
    return tensor.requires_grad_(requires_grad)


def _parameter(args: tuple[Any, ...]) -> Tensor:
    need(len(args) == 3 and type(args[0]) is Tensor and type(args[1]) is bool, "a parameter is not made of a tensor.")
    need(isinstance(args[2], dict) and not args[2], "a parameter carries hooks.")
    return torch.nn.Parameter(args[0].detach(), args[1])


def _device(args: tuple[Any, ...]) -> torch.device:
    kind, index = (*args, None)[:2]
    proper = len(args) in (1, 2) and type(kind) is str and re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", kind) is not None
    need(proper and (index is None or (_count(index) and index < 1000)), "a device is not given by its name.")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _size(args: tuple[Any, ...]) -> torch.Size:
    need(len(args) == 1 and _counts(args[0]), "a torch.Size is not made of whole numbers.")
    return torch.Size(args[0])


def numpy_dtype(args: tuple[Any, ...]) -> np.dtype:
    code = args[0] if args else None
    need(type(code) is str and code in _NUMPY_CODES, "an array of NumPy is of a type that is not numeric.")
    return np.dtype(code)


def numpy_empty(args: tuple[Any, ...]) -> np.ndarray:
    proper = len(args) == 3 and args[0] is _NDARRAY and args[1:] == ((0,), b"b")
    need(proper, "an array of NumPy does not start out as an empty one.")
    return np.ndarray((0,), dtype=np.int8)


def numpy_fill(array: np.ndarray, state: Any) -> None:
    """What follows an empty array: its shape, type, order and bytes."""
    need(type(state) is tuple and len(state) == 5, "an array of NumPy has an unexpected number of fields.")
    version, shape, dtype, fortran, data = state
    need(type(version) is int and version == 1, "an array of NumPy is of an unknown version of its format.")
    need(type(fortran) in (bool, int) and _fits(shape, dtype, data), "an array of NumPy does not fit its bytes.")
    array.__setstate__((1, shape, dtype, bool(fortran), data))  # type: ignore[arg-type]  # the stub wants NumPy's bool


def _numpy_from(args: tuple[Any, ...]) -> np.ndarray:
    """How protocol 5 stores an array."""
    need(len(args) in (4, 5), "an array of NumPy has an unexpected number of fields.")
    data, dtype, shape, order, axes = (*args, None)[:5]
    data = bytes(data) if type(data) is bytearray else data
    need(_fits(shape, dtype, data), "an array of NumPy does not fit its bytes.")
    proper = type(order) is str and order in ("C", "F", "K") and (axes is None or _counts(axes))
    need(proper and (axes is not None or order != "K"), "an array of NumPy has its axes in an unknown order.")
    flat = np.zeros(0, dtype) if not data else np.frombuffer(data, dtype).copy()
    return flat.reshape(shape, order="C").transpose(axes) if order == "K" else flat.reshape(shape, order=order)


def _numpy_scalar(args: tuple[Any, ...]) -> Any:
    need(len(args) == 2 and _fits((), *args), "a number of NumPy does not fit its bytes.")
    return np.frombuffer(args[1], args[0])[0]


def _fits(shape: Any, dtype: Any, data: Any) -> bool:
    proper = _counts(shape) and isinstance(dtype, np.dtype) and type(data) is bytes
    return proper and dtype.str[1:] in _NUMPY_CODES and math.prod(shape) * dtype.itemsize == len(data)


def check_byte_order(dtype: np.dtype, state: Any) -> None:
    """What follows a numeric type: the byte order, and fields only other types have. The type is already right."""
    proper = type(state) is tuple and len(state) == 8 and type(state[0]) is int and type(state[1]) is str
    need(proper and all(v is None for v in state[2:5]), "an array of NumPy is of a type that is not numeric.")
    here = "<" if sys.byteorder == "little" else ">"
    need(state[1] in ("|", "=", here), f"an array of NumPy has the byte order {shown(state[1])!r}, not this machine's.")


def _encoded(args: tuple[Any, ...]) -> bytes:
    """Bytes in protocol 2, which stores them as text."""
    proper = len(args) == 2 and all(type(a) is str for a in args) and args[1] in ("latin1", "latin-1")
    need(proper, "bytes are not stored as Latin-1 text.")
    return args[0].encode("latin-1")


def _no_bytes(args: tuple[Any, ...]) -> bytes:
    need(args == (), "bytes are made from something.")
    return b""


def _bytearray(args: tuple[Any, ...]) -> bytearray:
    if len(args) == 1 and type(args[0]) is bytes:
        return bytearray(args[0])
    return bytearray(_encoded(args) if args else b"")


def _set(args: tuple[Any, ...]) -> set[Any]:
    need(len(args) in (0, 1) and all(type(a) is list for a in args), "a set is not made from a list.")
    return set_of(args[0] if args else [])


def _frozenset(args: tuple[Any, ...]) -> frozenset[Any]:
    return frozenset(_set(args))


def set_of(items: list[Any]) -> set[Any]:
    need(all(map(hashable, items)), "a set has members other than numbers and text.")
    return set(items)


def _ordered(args: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    need(args == (), "an OrderedDict is made from something.")
    return OrderedDict()


def _easy_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    need(args == (), "an EasyDict is made from something.")
    return {}


_NDARRAY = Global("numpy.ndarray")
_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    f"{PERSISTENT}._reconstruct_persistent_obj": _persistent,
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _encoded,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _load_storage,
    "torch.device": _device,
    "torch.Size": _size,
    "numpy.dtype": numpy_dtype,
}
for _module in ("builtins", "__builtin__"):  # the latter in protocol 2
    _CALLS |= {f"{_module}.set": _set, f"{_module}.frozenset": _frozenset}
    _CALLS |= {f"{_module}.bytes": _no_bytes, f"{_module}.bytearray": _bytearray}
for _module in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _CALLS |= {f"{_module}.multiarray._reconstruct": numpy_empty, f"{_module}.multiarray.scalar": _numpy_scalar}
    _CALLS |= {f"{_module}.numeric._frombuffer": _numpy_from}
GLOBALS: dict[str, Any] = {name: Global(name, call=call) for name, call in _CALLS.items()}
GLOBALS |= {f"torch.{name}": dtype for name, dtype in _DTYPES.items()}
GLOBALS["numpy.ndarray"] = _NDARRAY
for _name in ("dnnlib.util.EasyDict", "dnnlib.EasyDict"):
    GLOBALS[_name] = Global(_name, call=_easy_dict, new=dict)
