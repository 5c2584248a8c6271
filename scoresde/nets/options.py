"""The options of a network: their kinds, their limits, and the configuration that rebuilds it. Layer 0.

Every network calls `arguments(locals())` first, before any memory is taken, so that a wrong option, whether from a person or
from a file, is one line that names it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

# The upper limits are far beyond any published network: what they refuse is a mistake, or a file that means harm.
_CHANNELS = (1, 2**14)
_AMOUNT = (0, 2**24)
LIMITS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("in_channels", "out_channels", "width", "channels", "head_channels"), _CHANNELS),
    **dict.fromkeys(("heads", "group_channels", "max_groups", "attention_groups"), _CHANNELS),
    **dict.fromkeys(("dim", "embedding", "embedding_width", "frequencies"), (1, 2**16)),
    **dict.fromkeys(("size", "patch", "attention"), (1, 2**20)),
    **dict.fromkeys(("blocks", "depth"), (1, 256)),
    **dict.fromkeys(("cond_dim", "numbers", "tokens", "pooled", "spatial", "positions"), (0, 2**14)),
    "classes": _AMOUNT,
    "steps": (0, 2**16),
    "dilations": (1, 2**10),
}
POSITIVE = {"multipliers": 2**10, "mlp_ratio": 2**6, "eps": 1, "mlp_eps": 1, "fourier_scale": 2**20}
SHARES = ("dropout",)
ENTRIES = 64


def arguments(scope: dict[str, Any], **limits: tuple[int, int]) -> dict[str, Any]:
    """A constructor's arguments from its `locals()`: the configuration that rebuilds the network, in Python's own types.

    The constructor's annotations say of which kind each must be (lists count as tuples, NumPy's numbers as Python's; True is
    no integer), and `LIMITS`, `POSITIVE`, `SHARES` and this network's own `limits` by name in which range. Raises `TypeError`
    for another kind, `ValueError` outside the range, NaN and infinity included.
    """
    kinds = scope["__class__"].__init__.__annotations__
    found = {}
    for name, value in scope.items():
        if name in ("self", "__class__"):
            continue
        found[name] = _as_annotated(name, value, kinds[name])
        many = found[name] if isinstance(found[name], tuple) else (found[name],)
        if len(many) > ENTRIES:
            raise ValueError(f"{name} must have at most {ENTRIES} entries, got {len(many)}.")
        for v in many:
            if isinstance(v, (int, float)) and not isinstance(v, bool):
                _check_range(name, v, found[name], limits.get(name, LIMITS.get(name)))
    return found


def choices(given: Mapping[str, Any], **options: tuple[str, ...]) -> None:
    """`ValueError` that names the option of `given` which is none of its choices."""
    for name, known in options.items():
        if given[name] not in known:
            raise ValueError(f"unknown {name} {given[name]!r}; use one of {', '.join(known)}.")


def _check_range(name: str, value: float, given: Any, limit: tuple[int, int] | None) -> None:
    if name in SHARES:
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {given}.")
    elif not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {given}.")
    elif name in POSITIVE:
        if not 0.0 < value <= POSITIVE[name]:
            raise ValueError(f"{name} must be more than 0 and at most {POSITIVE[name]}, got {given}.")
    elif limit is not None and value < limit[0]:
        raise ValueError(f"{name} must be at least {limit[0]}, got {given}.")
    elif limit is not None and value > limit[1]:
        raise ValueError(f"{name} must be at most {limit[1]}, got {given}.")


_WORDS = {"int": "an integer", "float": "a number", "bool": "True or False", "str": "a string", "None": "None"}


def _as_annotated(name: str, value: Any, annotation: str) -> Any:
    """`value` in Python's own types; `TypeError` unless it is one of the kinds that the annotation names."""
    kinds = annotation.split(" | ")
    for kind in kinds:
        try:
            return _as_kind(value, kind)
        except TypeError:
            continue
    sequences = [kind for kind in kinds if kind.startswith("Sequence")]
    if len(kinds) == len(sequences) and not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple, one number for each axis or resolution, got {value!r}.")
    wanted = " or ".join(_WORDS.get(kind, _sequence_words(kind)) for kind in kinds)
    raise TypeError(f"{name} must be {wanted}, got {value!r}.")


def _sequence_words(kind: str) -> str:
    if kind.startswith("Mapping"):
        return "a dict of numbers"
    return "a tuple of integers" if kind == "Sequence[int]" else "a tuple of numbers"


def _as_kind(value: Any, kind: str) -> Any:
    if kind == "None" and value is None:
        return None
    if kind.startswith("Sequence") and isinstance(value, (tuple, list)):
        return tuple(_as_kind(v, kind[len("Sequence[") : -1]) for v in value)
    if kind.startswith("Mapping") and isinstance(value, Mapping):
        return {_as_kind(k, "str"): _as_kind(v, "float") for k, v in value.items()}
    if kind == "str" and isinstance(value, str):
        return str(value)
    if kind == "bool" and isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, bool):
        raise TypeError
    if kind in ("int", "float") and isinstance(value, numbers.Integral):
        return int(value)
    if kind == "float" and isinstance(value, numbers.Real):
        return float(value)
    raise TypeError
