"""Bits/dim of many images under a model, as a job. Layer 4."""

from __future__ import annotations

import os
import warnings
from typing import Any, cast

import torch
from torch import Tensor

from scoresde import checks
from scoresde._version import __version__
from scoresde.jobs.job import Job
from scoresde.likelihood import BitsPerDim, Exact, Hadamard, bits_per_dim
from scoresde.likelihood.bits import estimate_text, levels_of, summarize, survey_of, surveyed
from scoresde.models.base import ScoreModel
from scoresde.modes import device_of
from scoresde.store import describe, digest

FORMAT = 1


def estimator_options(probes: int, rtol: float) -> dict[str, Any]:
    """How a log density is estimated, from plain values to arguments of `bits_per_dim`: `probes` orthogonal ones in two
    independent halves (an odd number in one), 0 for the exact trace; `rtol`, of the solver."""
    check_probes(probes)
    checks.positive(rtol, "rtol")
    divergence = Hadamard(probes, 1 if probes % 2 else 2) if probes else Exact()
    return dict(divergence=divergence, rtol=rtol, atol=rtol)


def check_probes(probes: int) -> None:
    """`ValueError` for a negative number of probes."""
    if probes < 0:
        raise ValueError(f"probes must be at least 0 (0 takes the exact trace), got {probes}.")


def numbers_of(result: BitsPerDim) -> dict[str, Any]:
    """What a `BitsPerDim` says of all images together. `trace_stderr` is the part of the mean's standard error that the
    trace estimates explain; NaN where they give no error of their own."""
    trace = result.trace_stderr[result.status == 0]
    return {
        "bits_per_dim": result.mean,
        "stderr": result.stderr,
        "trace_stderr": float(trace.square().sum().sqrt() / max(len(trace), 1)),
        "images": len(result.status),
        "nfe": result.nfe,
        "unfinished": int((result.status != 0).sum()),
    }


class BitsJob(Job):
    """Bits/dim of all `images` (`data.Images`) under a model, stored chunk by chunk in a folder.

    Arguments: `model` on its device; `folder` and `batch_size` as in `Job`; `estimator`, for `estimator_options`;
    `dequantization`, those of `bits_per_dim`; `seed`.

    Raises `ValueError` for images of another shape or other levels than the model's, and for impossible numbers; the rest as
    in `Job`.
    """

    kind, task, item, values_file = "bpd", "bits/dim", "image", "images.npz"

    def __init__(
        self,
        model: ScoreModel,
        images: Any,
        folder: str | os.PathLike[str] | None,
        *,
        estimator: dict[str, Any],
        dequantization: dict[str, Any],
        seed: int,
        batch_size: int,
    ):
        self.model, self.images = model, images
        model.check_event(images.event_shape)
        levels_of(model, images.levels)
        for name in ("samples", "draws"):
            checks.positive_int(dequantization.get(name, 1), name)
        self.options = dict(**estimator_options(**estimator), **dequantization, seed=seed)
        settings = {
            "format": FORMAT,
            "version": __version__,
            "torch": str(torch.__version__),
            "device": device_of(model).type,
            "model_sha256": digest(model.state_dict(), describe(model)),
            "data_sha256": digest({"images": images.values}),
            "images": len(images),
            "levels": images.levels,
            "seed": seed,
            **estimator,
            **dequantization,
        }
        super().__init__(folder, settings, len(images), batch_size)

    def compute(self, rows: range) -> dict[str, Tensor]:
        if "plan" not in self.options:  # once for all chunks; it depends on the model alone
            how = {name: self.options[name] for name in ("divergence", "rtol", "atol")}
            wanted = surveyed(self.model, how["divergence"], "decoupled")
            self.options["plan"] = survey_of(self.model, **how) if wanted else None
        with warnings.catch_warnings():  # of images that do not finish the summary speaks, once for all
            warnings.filterwarnings("ignore", message=r"\d+ of \d+ examples did not finish")
            result = bits_per_dim(
                self.model,
                self.images.values[rows.start : rows.stop],
                levels=self.images.levels,
                batch_size=self.batch_size,
                first=rows.start,
                **self.options,
            )
        return {
            "bits_per_dim": result.per_example,
            "per_draw": cast(Tensor, result.per_draw),
            "trace_stderr": result.trace_stderr,
            "nfe": cast(Tensor, result.nfe_per_example),
            "status": result.status,
        }

    def estimate(self, known: list[dict[str, Tensor]]) -> str:
        return estimate_text(torch.cat([tensors["bits_per_dim"] for tensors in known]))

    def summary(self, whole: dict[str, Tensor]) -> dict[str, Any]:
        result = summarize(*(whole[name] for name in ("per_draw", "trace_stderr", "nfe", "status")))
        return {**numbers_of(result), "draw_stderr": result.draw_stderr}
