"""Errors at the public boundary: what was given, what is expected, what to do.

Layer 0. Every check raises `ValueError` or `TypeError`; none of them forces a GPU to synchronise with the
host, so the value of a CUDA tensor is looked at only where the docstring says so.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class NonFiniteError(FloatingPointError, ValueError):
    """A network or a solver produced NaN or infinity; the message names the step, t and the samples."""


def rows_text(rows: Sequence[int], limit: int = 8) -> str:
    """`[0, 3, 5]`, shortened to `limit` entries."""
    shown = ", ".join(str(r) for r in rows[:limit])
    return f"[{shown}{', ...' if len(rows) > limit else ''}]"


def number(value: float, name: str) -> float:
    """`value` as a float; `ValueError` unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    return float(value)


def positive(value: float, name: str) -> float:
    """`value` as a float; `ValueError` unless it is finite and > 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}.")
    return float(value)


def positive_int(value: int, name: str) -> int:
    """`value` unchanged; `TypeError` unless an integer, `ValueError` unless >= 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer >= 1, got {value!r} ({type(value).__name__}).")
    value = int(value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


def log_snr_like(value: Any) -> None:
    """`TypeError` unless a number or a floating-point tensor."""
    number_like = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number_like or (isinstance(value, Tensor) and value.is_floating_point())):
        got = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"a log-SNR must be a number or a floating-point tensor, got {got}.")


def level_count(value: int, name: str = "levels") -> int:
    """`value` as an int; `TypeError` unless an integer, `ValueError` unless >= 2."""
    if positive_int(value, name) < 2:
        raise ValueError(f"{name} must be at least 2, got {value}.")
    return int(value)


def value_range(value: Sequence[float], name: str = "value_range") -> tuple[float, float]:
    """`value` as two floats; `ValueError` unless they are finite numbers (low, high) with low < high."""
    try:
        low, high = (float(v) for v in (() if isinstance(value, str) else value))
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name} must be two numbers (low, high), got {value!r}.") from e
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name} must be (low, high), finite, with low < high, got {value!r}.")
    return low, high


def event_shape(value: Sequence[int], name: str = "event_shape") -> tuple[int, ...]:
    """`value` as a tuple of ints; `TypeError` unless a sequence of integers, `ValueError` unless at least one, each >= 1."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be the shape of one example, such as (3, 32, 32), got {value!r}.")
    shape = tuple(positive_int(n, f"every size in {name}") for n in value)
    if not shape:
        raise ValueError(f"{name} must have at least one axis, got {value!r}.")
    return shape


def ordered(low: float, high: float, low_name: str, high_name: str) -> None:
    """`ValueError` unless 0 < low < high < infinity."""
    positive(low, low_name)
    positive(high, high_name)
    if low >= high:
        raise ValueError(f"{low_name} must be smaller than {high_name}, got {low_name}={low}, {high_name}={high}.")


def choice(value: Any, options: Iterable[str], name: str) -> str:
    """`value` if it is one of `options`; otherwise a `ValueError` that lists them."""
    options = list(options)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"unknown {name} {value!r}; choose one of: {', '.join(options)}.")
    return value


def batch(x: Any, name: str = "x") -> Tensor:
    """A floating-point tensor with a batch axis, (B, *event) with at least one event axis.

    Raises `TypeError` for anything but a floating-point tensor, `ValueError` for a missing event axis.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor of shape (B, ...), got {type(x).__name__}; convert it with torch.as_tensor."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must hold floating-point data, got dtype {x.dtype}; scale integer data first "
            "(for integer images and bits/dim use bits_per_dim)."
        )
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (B, ...) with a batch axis first, got shape {tuple(x.shape)}.")
    return x


def finite(x: Tensor, name: str) -> None:
    """`ValueError` naming the rows of `x` (B, ...) that hold NaN or infinity. Reads the values (one synchronisation)."""
    ok = torch.isfinite(x).flatten(1).all(1) if x.dim() > 1 else torch.isfinite(x)
    if not bool(ok.all()):
        rows = (~ok).nonzero().flatten().tolist()
        raise ValueError(
            f"{name} holds NaN or infinity in {len(rows)} of {x.shape[0]} rows, {rows_text(rows)}; remove or repair them."
        )


def same_shape(got: Tensor, expected: Sequence[int], what: str) -> Tensor:
    """`got` if its shape is `expected`; otherwise a `ValueError` with both shapes."""
    if tuple(got.shape) != tuple(expected):
        raise ValueError(
            f"{what} has shape {tuple(got.shape)}, expected {tuple(expected)}; nothing is broadcast silently, so give it "
            "that shape."
        )
    return got


def time_like(t: Any, batch_size: int | None = None) -> None:
    """t is a float or a tensor of shape () or (B,) within [0, 1].

    The range is checked for Python numbers and CPU tensors only: reading a CUDA tensor would stall the device.
    """
    if isinstance(t, Tensor):
        if not t.is_floating_point():
            raise TypeError(f"t must be floating point, got dtype {t.dtype}; use t.float() or t.double().")
        if batch_size is not None and t.dim() and tuple(t.shape) != (batch_size,):
            raise ValueError(f"t must have shape () or ({batch_size},) to match the batch, got {tuple(t.shape)}.")
        if t.device.type != "cpu" or t.numel() == 0:
            return
        low, high = (v.item() for v in torch.aminmax(t.detach()))
    elif isinstance(t, numbers.Real) and not isinstance(t, bool):
        low = high = float(t)
    else:
        raise TypeError(f"t must be a number or a tensor of times, got {type(t).__name__}.")
    if not (low >= 0.0 and high <= 1.0):  # also catches NaN
        raise ValueError(f"t must lie in [0, 1] (0 = data, 1 = prior), got values from {low:g} to {high:g}.")


def integers(data: Any, levels: int, name: str = "data") -> Tensor:
    """Integer data in 0..levels-1 as a tensor; `TypeError` for floats, `ValueError` with the minimum and maximum."""
    level_count(levels)
    if not isinstance(data, Tensor):
        try:
            data = torch.as_tensor(data)
        except (TypeError, ValueError, RuntimeError) as e:
            raise TypeError(f"{name} must be an integer tensor or array, got {type(data).__name__}.") from e
    if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
        raise TypeError(
            f"{name} must hold integers 0..{levels - 1}, got dtype {data.dtype}; pass the raw pixel values (for example "
            "uint8), not scaled floats. For continuous data use log_prob, which answers in nats."
        )
    if data.numel():
        low, high = (int(v) for v in torch.aminmax(data.long()))  # unsigned 16-bit tensors have no minimum of their own
        if low < 0 or high > levels - 1:
            raise ValueError(
                f"{name} must lie in 0..{levels - 1} for levels={levels}, got minimum {low} and maximum {high}; "
                "pass the right levels= or the raw values."
            )
    return data
