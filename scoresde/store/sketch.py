"""Networks built twice: without memory, to compare them with a file, and for real, without touching random states. Layer 3."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


@contextlib.contextmanager
def untouched_random() -> Iterator[None]:
    """The random states of torch (on the CPU), NumPy and Python are afterwards what they were before."""
    numbers, python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(python)


@contextlib.contextmanager
def on_meta(tensors: int) -> Iterator[None]:
    """Networks made within have shapes but no memory, and may not have many more parts than a file has tensors.

    Raises `ValueError` where an option asks for more, which takes no longer than to make those few.
    """
    limit, here = 2 * tensors + 2000, threading.get_ident()
    made = {"parameter tensors": 0, "layers": 0}

    def counting(what: str) -> Callable[..., None]:
        def count(*_: object) -> None:
            if threading.get_ident() == here:  # the hooks are those of all threads
                made[what] += 1
                if made[what] > limit:
                    raise ValueError(
                        f"the options describe a network of more than {limit} {what}, the file holds {tensors} tensors"
                    )

        return count

    hooks = (
        register_module_parameter_registration_hook(counting("parameter tensors")),
        register_module_module_registration_hook(counting("layers")),
    )
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def real_like(net: nn.Module) -> nn.Module:
    """A network on the CPU that was made with the same options, `net.config`, as one on meta; its numbers are arbitrary."""
    with untouched_random(), torch.device("cpu"):
        return type(net)(**cast(Mapping[str, Any], net.config))
