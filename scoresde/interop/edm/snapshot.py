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

Why this is kept, 650 lines for weights alone: the published networks of EDM and EDM2 exist as nothing but such pickles, and every
other way to their weights, NVIDIA's own included, runs the source code that the file brings. A subclass of `pickle.Unpickler`
would be shorter and would not do (see below). The two files of this room know nothing of the rest of the package but its checks
of paths.

Limits. Only weights and constructor arguments are recovered, not behaviour: the source code in the file is skipped
over and a `Record` cannot be called. Options are plain dicts, without attribute access. EDM2's networks have no
counterpart in this package; their weights are for a live network of your own, `net.load_state_dict(
record.state_dict())`, with `net` made from NVIDIA's code and `record.init_kwargs`. Pickle protocols 2 to 5, version 6
of NVIDIA's format, dense tensors and NumPy arrays of numbers in this machine's byte order are read, nothing else; a
network that keeps a function among its attributes (an activation, a hook) is refused with that function's name.
While a file is read it takes about twice its size in memory.
"""

from __future__ import annotations

import os
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scoresde.interop.edm.snapshot_values import (
    GLOBALS,
    Global,
    Record,
    RefusedError,
    attributes_of,
    check_byte_order,
    described,
    hashable,
    need,
    numpy_dtype,
    numpy_empty,
    numpy_fill,
    set_of,
    shown,
    words,
)
from scoresde.store import as_path, check_regular

NETWORK_KEYS = ("ema", "net")


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a snapshot: its dict, with a `Record` for each object in it.

    Numbers, strings, containers, tensors (on the CPU) and arrays are what they were; a class among the options, such
    as a layer of PyTorch, remains a token with its name. Nothing in the file is executed, whatever it contains. Raises
    `FileNotFoundError` where there is no file and `ValueError` for a file that asks for anything but the contents of
    such a snapshot (naming it), for a damaged or truncated one and for other formats.
    """
    path = as_path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give the path of a downloaded .pkl of EDM or EDM2.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of the .pkl file in it.")
    check_regular(path)
    with open(path, "rb") as f:
        _look_at_start(f.read(64), path)
        f.seek(0)
        source = _Source(f, os.fstat(f.fileno()).st_size)
        try:
            content = _Machine(source).load()
        except RefusedError as e:
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
                f"({type(e).__name__}: {shown(str(e), 300)}). Nothing in it was executed. Get the file again and "
                "compare its size with the original's."
            ) from e
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {described(content)}, not a dict with a network; it is no snapshot of EDM or EDM2."
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
    present = ", ".join(f"{shown(repr(k))} (a {described(v)})" for k, v in list(content.items())[:30])
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


_VALUES = words(
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
        arg: Any
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
                self.stack.append(tuple(items) if name == "TUPLE" else frozenset(set_of(items)))
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
                need(2 <= arg <= 5, f"it is a pickle of protocol {arg}; 2 to 5 are read.")
            elif name == "STOP":
                if self.below or len(stack) != 1:
                    raise ValueError("the pickle ends in the middle of an object")
            else:
                need(name == "FRAME", f"it has the instruction {name}, which no snapshot needs.")
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
        need(type(module) is str and type(name) is str, "a name of a class or function is not text.")
        full = f"{module}.{name}"
        # The joined name alone would let one split at another point pass: harmless, but not what was written.
        if full in GLOBALS and "." not in name:
            return GLOBALS[full]
        layer = re.fullmatch(r"torch\.nn\.modules(\.[a-z_0-9]+)+", module) and re.fullmatch(r"_*[A-Z]\w*", name, re.A)
        need(bool(layer), f"it names {shown(full)}, which is not among the few classes and functions of a snapshot.")
        return Global(full, new=lambda: Record(name, module))

    def make(self, opcode: str, token: Any, args: Any) -> Any:
        need(type(token) is Global, f"it calls or makes an object of a {described(token)}.")
        need(type(args) is tuple, f"it calls {token.name} with a {type(args).__name__}, not a tuple.")
        if opcode == "REDUCE":
            need(token.call is not None, f"it calls {token.name}, which snapshots do not.")
            made = token.call(args)
        else:
            need(token.new is not None and args == (), f"it makes a {token.name} in a way that snapshots do not.")
            made = token.new()
        if token.call in (numpy_empty, numpy_dtype) or (token.call is None and isinstance(made, Record)):
            self.unfilled[id(made)] = made
        return made

    def fill(self, state: Any) -> None:
        """The attributes of the object on top of the stack. Only what was just made may get any, and only once."""
        target = self.stack[-1]
        if isinstance(target, np.dtype) and id(target) in self.unfilled:  # one object for all arrays of the type
            check_byte_order(target, state)
            return
        need(self.unfilled.pop(id(target), self) is target, f"it sets attributes of a {described(target)}.")
        if isinstance(target, Record):
            target.state = attributes_of(state)
        else:
            numpy_fill(target, state)

    def extend(self, opcode: str, items: list[Any]) -> None:
        """Items for the container on top of the stack, which has to be one of Python's own."""
        target = self.stack[-1]
        if opcode.startswith("APPEND"):
            need(type(target) is list, f"it appends to a {described(target)}.")
            target.extend(items)
        elif opcode == "ADDITEMS":
            need(type(target) is set, f"it adds to a {described(target)}.")
            target |= set_of(items)
        else:
            need(type(target) in (dict, OrderedDict), f"it sets items of a {described(target)}.")
            need(all(map(hashable, items[::2])), "a dict has keys other than numbers and text.")
            target.update(zip(items[::2], items[1::2], strict=True))
