"""Evaluation mode around a computation. Layer 0."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn

_LOCK = threading.Lock()
_HELD: weakref.WeakKeyDictionary[nn.Module, int] = (
    weakref.WeakKeyDictionary()
)  # by how many computations, out of training mode


@contextlib.contextmanager
def evaluating(module: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """No gradients (unless asked for), dropout and the like off; every submodule's own mode is restored afterwards.

    Several threads may be in here with one module, or with modules that share some: the last one out restores the mode.
    """
    with _LOCK:
        held = [m for m in module.modules() if m.training or m in _HELD]
        for m in held:
            _HELD[m] = _HELD.get(m, 0) + 1
        module.eval()
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            yield
    finally:
        with _LOCK:
            for m in held:
                _HELD[m] -= 1
                if not _HELD[m]:
                    del _HELD[m]
                    m.training = True


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a module with neither."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(module: nn.Module) -> torch.dtype:
    """float64 for a network in float64, else float32: what solvers keep their state in."""
    first = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return torch.float64 if first == torch.float64 else torch.float32
