"""The processes of a training run: one, or those of a launcher, which must decide alike. Layer 4."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from scoresde import checks
from scoresde.jobs import launched

PRECISIONS = ("no", "bf16")
_LAUNCHED = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets beside RANK and WORLD_SIZE


def start(device: str) -> Any:
    """accelerate's `Accelerator` of this process, with those of the others found.

    `device` is "auto" (CUDA where there is one), "cpu" or "cuda". Mixed precision is read from where accelerate's launcher leaves
    it. Raises `ValueError` for another device or precision, and where the environment is half a launcher's: alone, such a
    process would wait for ever or train a model of its own.
    """
    cpu = _use_cpu(device)
    size = launched()[1]
    missing = [name for name in _LAUNCHED if not os.environ.get(name)]
    if size > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE={size} asks for a run of {size} processes, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; start them with torchrun --nproc_per_node {size} --no-python "
            "scoresde train ..., or unset WORLD_SIZE."
        )
    if not cpu and size > 1 and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise ValueError(
            f"process {os.environ['LOCAL_RANK']} of this machine has no CUDA device of its own (there are "
            f"{torch.cuda.device_count()}); start as many processes as devices, or use device=cpu."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    checks.choice(precision, PRECISIONS, "mixed precision (ACCELERATE_MIXED_PRECISION)")
    from accelerate import Accelerator

    threads = torch.get_num_threads()
    try:
        return Accelerator(cpu=cpu, mixed_precision=precision)
    finally:
        torch.set_num_threads(threads)  # which accelerate sets for the processes of a CPU


def _use_cpu(device: str) -> bool:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda for training, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=cpu or auto.")
    return device == "cpu" or not torch.cuda.is_available()


@contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """What may fail on one process inside: then it fails on all, instead of leaving the others to wait for it."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    if accelerator.num_processes > 1:
        said: list[str | None] = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(said, None if error is None else str(error) or type(error).__name__)
        failed = [(i, text) for i, text in enumerate(said) if text is not None]
        if error is None and failed:
            error = RuntimeError(f"process {failed[0][0]} of this run stopped: {failed[0][1]}")
    if error is not None:
        raise error


def largest(accelerator: Any, *values: float) -> list[float]:
    """Each value's largest over the processes, the same on all of them."""
    if accelerator.num_processes == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return shared.tolist()
