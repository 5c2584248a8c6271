"""What an object was made of: descriptions by name and options, nested, and objects from them. Layer 3.

`describe` turns a model, a network, a process or anything else that is known into `{"name": ..., "options": {...}}`, which JSON
can hold, and `build` makes an equal one from it. Known are the public classes of the rooms below, and what `register` adds:

    @scoresde.store.register
    class MyNet(nn.Module):
        def __init__(self, width, depth=3): ...

An object's options are its attribute `config` if that is a dict, else the arguments of its constructor: the attribute of an
argument's name or, for registered classes that keep none, the value it was called with. Values may be None, booleans, numbers of
Python and NumPy, fractions, text, tuples, lists, dicts, tensors and other known objects; each comes back as what it was.
Tensors are not part of a description: they are collected beside it, to be stored with the weights.

| in the description | is |
|---|---|
| null, booleans, numbers, text | themselves |
| an array | a tuple (a list has `{"$list": [...]}`) |
| `{"name": ..., "options": ...}` | an object |
| `{"$numpy": [type, value]}`, `{"$fraction": [n, d]}`, `{"$float": "inf"}` | a number |
| `{"$tensor": key}` | a tensor, with the digest of its contents under `"sha256"` |
| `{"$same": path}` | the module that is described at that place |
| another object | a dict (one with keys that are not plain text has `{"$dict": [[key, value], ...]}`) |
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from scoresde import guidance, models, nets, sde
from scoresde.models.base import ScoreModel
from scoresde.sde import SDE
from scoresde.store.files import digest

TENSORS = "option:"  # what the keys of options' tensors begin with; no name of a weight does
_ROOMS = (sde, nets, models, guidance)
_GIVEN = "_scoresde_arguments"
_DEPTH = 100
_registered: dict[str, tuple[type, Callable[[Any], Mapping[str, Any]] | None]] = {}
T = TypeVar("T", bound=type)


def register(
    cls: T | None = None, *, name: str | None = None, options: Callable[[Any], Mapping[str, Any]] | None = None
) -> Any:
    """Make a class of your own known to `save_pretrained` and `load`; a decorator, with or without arguments.

    name: what files call it, by default the class's name. options: a function of an object that returns the arguments to make it
    again, for a class that keeps neither a `config` nor attributes of its arguments' names and is not yours to change.

    A program that loads such a file has to register the class first. Raises `TypeError` for what is no class, `ValueError` for
    a name that another class has.
    """
    if cls is None:
        return functools.partial(register, name=name, options=options)
    if not isinstance(cls, type):
        raise TypeError(f"register takes a class, got {cls!r}; for an object register its type.")
    name = name or cls.__name__
    there = classes().get(name)
    if there is not None and (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{name!r} is the name of {there!r} already; give another by register(name=...).")
    if options is None and "config" not in vars(cls):
        _remember_arguments(cls)
    _registered[name] = cls, options
    return cls


def _remember_arguments(cls: type) -> None:
    """From now on its objects know what they were made with."""
    made: Any = cls
    plain = made.__init__

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if type(self) is cls:
            with contextlib.suppress(AttributeError):  # of classes with slots
                bound = inspect.signature(plain).bind(self, *args, **kwargs)
                object.__setattr__(self, _GIVEN, bound.arguments)

    made.__init__ = init


def classes() -> dict[str, type]:
    """Every class that can be described, by name: the public ones of the package's rooms, and the registered ones."""
    found: dict[str, type] = {}
    for room in _ROOMS:
        for name in room.__all__:
            value = getattr(room, name)
            if not isinstance(value, type) or inspect.isabstract(value):
                continue
            if issubclass(value, (nn.Module, SDE, models.GaussianMixture)) or dataclasses.is_dataclass(value):
                found[name] = value
    return found | {name: cls for name, (cls, _) in _registered.items()}


def describe(value: Any, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """`{"name": ..., "options": {...}}` of a model, network, process or any other object of a known class.

    tensors: a dict that takes the tensors among the options, by the keys that the description gives them; without it only their
    digests are there. Raises `TypeError` for objects of unknown classes and for options that cannot be written down, naming
    where they stand.
    """
    return _Writer({} if tensors is None else tensors).object(value, "", 0)


class _Writer:
    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.seen: dict[int, str] = {}

    def object(self, value: Any, path: str, depth: int) -> dict[str, Any]:
        cls = type(value)
        name = next((n for n, known in classes().items() if known is cls), None)
        if name is None:
            raise TypeError(
                f"{'the option ' + path + ' is' if path else 'this is'} a {cls.__name__}, a class that is not known here, so it "
                "could not be rebuilt from a file. Make it known by @scoresde.store.register, or save its weights with "
                "torch.save(model.state_dict())."
            )
        if isinstance(value, nn.Module):
            if id(value) in self.seen:
                return {"$same": self.seen[id(value)]}
            self.seen[id(value)] = path
        options = {k: self.value(v, f"{path}.{k}".lstrip("."), depth + 1) for k, v in options_of(value, path).items()}
        return {"name": name, "options": options}

    def value(self, value: Any, path: str, depth: int = 0) -> Any:
        if depth > _DEPTH:
            raise TypeError(f"the option {path[:80]} is nested more than {_DEPTH} deep, or contains itself.")
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
            plain = value.item()
            return {"$numpy": [value.dtype.name, self.value(plain, path)]}
        if isinstance(value, Fraction):
            return {"$fraction": [value.numerator, value.denominator]}
        if isinstance(value, Tensor):
            key = TENSORS + path
            self.tensors[key] = value.detach()
            return {"$tensor": key, "sha256": digest({"": value})}
        inner = lambda items: [self.value(v, f"{path}.{i}", depth + 1) for i, v in enumerate(items)]  # noqa: E731
        if type(value) in (tuple, torch.Size):
            return tuple(inner(value))
        if type(value) is list:
            return {"$list": inner(value)}
        if type(value) is dict:
            plain = all(type(k) is str and not k.startswith("$") for k in value) and value.keys() != {"name", "options"}
            values = inner(value.values())
            if plain:
                return dict(zip(value, values, strict=True))
            return {"$dict": [list(pair) for pair in zip(inner(value), values, strict=True)]}
        return self.object(value, path, depth)


def options_of(value: Any, path: str = "") -> dict[str, Any]:
    """The arguments that make an equal object, by name. Raises `TypeError` where the object does not tell them."""
    _, own = next((entry for entry in _registered.values() if entry[0] is type(value)), (None, None))
    if own is not None:
        return dict(own(value))
    config = getattr(value, "config", None)
    if isinstance(config, Mapping):
        return dict(config)
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    given = getattr(value, _GIVEN, {})
    options: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(value).__init__).parameters.items():
        if name == "self":
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            options |= given.get(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            if given.get(name):
                raise TypeError(f"{type(value).__name__} takes *{name}; give it a `config`, a dict of named arguments.")
        elif hasattr(value, name) and not isinstance(getattr(value, name), nn.Parameter):
            options[name] = getattr(value, name)
        elif name in given:
            options[name] = given[name]
        elif parameter.default is parameter.empty or not hasattr(value, _GIVEN):
            raise TypeError(
                f"{'the option ' + path if path else 'this'}, a {type(value).__name__}, does not keep its argument {name!r}; "
                "give it an attribute of that name, or a `config`, a dict of its arguments."
            )
    return options


def build(
    description: Any,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    source: str = "the description",
    meta: bool = False,
) -> Any:
    """An object from `describe`'s answer and the tensors that it collected.

    meta: make networks on the meta device, with shapes but without memory; a `RuntimeError` is then let through where a registered
    class is among them, which may not be made so. Only known names are made, none is looked up anywhere
    else. Raises `ValueError` naming `source` where the description is damaged, names an unknown class, or holds options that its
    classes refuse.
    """
    if not isinstance(description, Mapping) or "name" not in description:
        raise ValueError(f"{source} does not describe a scoresde model: it has no name and options.")
    reader = _Reader(tensors or {}, meta)
    try:
        return reader.value(description, "", 0)
    except Exception as e:  # whatever a constructor raises for options of the wrong kind
        if meta and reader.registered and isinstance(e, RuntimeError):
            raise
        raise ValueError(
            f"{source} does not describe a scoresde model that can be built ({type(e).__name__}: {e})."
        ) from e


class _Reader:
    def __init__(self, tensors: Mapping[str, Tensor], meta: bool):
        self.tensors, self.meta = tensors, meta
        self.made: dict[str, Any] = {}
        self.known = classes()
        self.registered = False

    def value(self, value: Any, path: str, depth: int) -> Any:
        if depth > 2 * _DEPTH:
            raise ValueError(f"it is nested more than {_DEPTH} deep")
        if isinstance(value, (list, tuple)):
            return tuple(self.inner(value, path, depth))
        if not isinstance(value, Mapping):
            return value
        if value.keys() == {"name", "options"}:
            return self.object(value["name"], value["options"], path, depth)
        tags = [k for k in value if isinstance(k, str) and k.startswith("$")]
        if tags:
            return self.tagged(tags[0], value[tags[0]], path, depth)
        return dict(zip(value, self.inner(value.values(), path, depth), strict=True))

    def inner(self, values: Any, path: str, depth: int) -> list[Any]:
        return [self.value(v, f"{path}.{i}", depth + 1) for i, v in enumerate(values)]

    def tagged(self, tag: str, content: Any, path: str, depth: int) -> Any:
        if tag == "$list":
            return self.inner(content, path, depth)
        if tag == "$dict":
            return {
                self.value(k, f"{path}.{i}", depth + 1): self.value(v, f"{path}.{i}", depth + 1)
                for i, (k, v) in enumerate(content)
            }
        if tag == "$fraction":
            return Fraction(*content)
        if tag == "$float":
            return float(content)
        if tag == "$numpy":
            kind = np.dtype(str(content[0]))
            if kind.kind not in "biuf":
                raise ValueError(f"{kind} is no type of a number")
            return kind.type(self.value(content[1], path, depth + 1))
        if tag == "$tensor":
            if content not in self.tensors:
                raise ValueError(f"the tensor of the option {path} is missing")
            return self.tensors[content]
        if tag == "$same":
            return self.made[content]
        raise ValueError(f"the option {path} holds an unknown {tag!r}")

    def object(self, name: Any, options: Any, path: str, depth: int) -> Any:
        if name not in self.known:
            raise ValueError(
                f"{name!r} is no class of scoresde, nor registered; if it is your own, import its module and register it with "
                "scoresde.store.register before loading"
            )
        cls = self.known[name]
        self.registered |= name in _registered
        values = {k: self.value(v, f"{path}.{k}".lstrip("."), depth + 1) for k, v in options.items()}
        network = issubclass(cls, nn.Module) and not issubclass(cls, (ScoreModel, SDE))
        with torch.device("meta" if self.meta and network else "cpu"):
            self.made[path] = cls(**values)
        return self.made[path]
