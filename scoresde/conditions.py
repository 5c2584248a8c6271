"""What a condition is, in one place. Layer 0.

`cond` is None, a tensor, or a dict, tuple or list of conditions, nested at will; every tensor in it has one row per example. It
goes to the network as it is; what the samplers and likelihoods do with one on the way (check it, move it, pick the rows of the
examples that are still being worked on) is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def each(cond: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same structure with `function` applied to every tensor. Raises `TypeError` for what cannot be in a condition."""
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        return function(cond)
    if isinstance(cond, dict):
        return {k: each(v, function) for k, v in cond.items()}
    if isinstance(cond, (tuple, list)):
        return tuple(each(v, function) for v in cond)
    raise TypeError(
        f"cond must be a tensor, or a dict or tuple of tensors, with one row per example, got {type(cond).__name__}; "
        "convert it with torch.as_tensor."
    )


def tensors(cond: Any) -> list[Tensor]:
    """Every tensor of a condition, in order."""
    found: list[Tensor] = []
    each(cond, found.append)
    return found


def check(cond: Any, batch_size: int) -> None:
    """`ValueError` unless every tensor of the condition has one row per example; `TypeError` for arrays and other things."""
    for value in tensors(cond):
        if value.dim() == 0 or value.shape[0] != batch_size:
            raise ValueError(f"cond must have one row per example, {batch_size}, got shape {tuple(value.shape)}.")


def take_rows(cond: Any, rows: Tensor | None) -> Any:
    """The condition of the examples `rows` (None for all of them)."""
    return cond if rows is None else each(cond, lambda value: value[rows])


def move(cond: Any, device: torch.device) -> Any:
    """The condition on `device`."""
    return each(cond, lambda value: value.to(device))


def repeat(cond: Any, times: int) -> Any:
    """The condition of the whole batch `times` times in a row: rows 0..B-1, 0..B-1, ..."""
    return each(cond, lambda value: value.repeat(times, *(1,) * (value.dim() - 1)))


def copy(cond: Any) -> Any:
    """The same condition in memory of its own; what is no part of a condition as it is."""
    if isinstance(cond, Tensor):
        return cond.clone()
    if type(cond) is dict:
        return {k: copy(v) for k, v in cond.items()}
    return type(cond)(copy(v) for v in cond) if type(cond) in (tuple, list) else cond


def row_count(cond: Any) -> int:
    """How many examples a condition is for: rows of its first tensor that has any; 0 where there is none."""
    return next((len(value) for value in tensors(cond) if value.dim() and len(value)), 0)
