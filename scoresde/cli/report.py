"""What runs say of themselves, for people and in metrics.json. Layer 5."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scoresde._version import __version__

if TYPE_CHECKING:
    from scoresde.data import Images
    from scoresde.models.base import ScoreModel
    from scoresde.train import Result, TrainOptions


def measure(
    net: ScoreModel, images: Images, *, probes: int = 8, rtol: float = 1e-4, seed: int = 0, batch_size: int = 64
) -> dict[str, Any]:
    """Test bits/dim as plain numbers: mean, standard error, NFE, seconds and settings. Nothing is stored."""
    from scoresde import bits_per_dim
    from scoresde.jobs import estimator_options, numbers_of

    start, cpu = time.perf_counter(), time.process_time()
    estimator: dict[str, Any] = dict(probes=probes, rtol=rtol)
    result = bits_per_dim(
        net,
        images.values,
        levels=images.levels,
        **estimator_options(**estimator),
        seed=seed,
        batch_size=batch_size,
        progress=True,
    )
    return {
        **numbers_of(result),
        **estimator,
        "probes": probes or "exact trace",
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }


def bits_line(m: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"{m['bits_per_dim']:.3f} +- {m['stderr']:.3f} bits/dim over {m['images']} images "
        f"({m['nfe']:.0f} network evaluations each, {m['seconds']:.0f} s)"
    )


def training_record(result: Result, options: TrainOptions) -> dict[str, Any]:
    """What metrics.json says of a training run."""
    return {
        "versions": {"scoresde": __version__, "torch": torch.__version__},
        "seed": options.seed,
        "options": options.to_json(),
        "training": {
            "steps": result.progress.step,
            "seconds": result.progress.seconds,
            "cpu_seconds": result.progress.cpu_seconds,
            "parameters": sum(p.numel() for p in result.model.parameters()),
            "history": result.progress.history,
        },
    }


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """metrics.json in the run's folder."""
    from scoresde.store import write_json

    write_json(folder / "metrics.json", metrics)
