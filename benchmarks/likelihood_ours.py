"""Our side of the likelihood benchmark: the configurations, all through the public `log_prob`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from likelihood_truth import Case
from torch import Tensor

from scoresde import Divergence, Exact, Hadamard, Hutchinson, log_prob, plan_likelihood
from scoresde.likelihood import LikelihoodPlan
from scoresde.likelihood.decoupled.trajectory import AngleWarp

# name -> arguments of log_prob beside divergence, rtol, atol and seed. The first is drawn boldest.
OURS: dict[str, dict[str, Any]] = {
    "decoupled": {"method": "decoupled"},
    "tsit5": {"method": "tsit5"},
    "dopri5": {"method": "dopri5"},
    "bosh3": {"method": "bosh3"},
}
# Trace estimates for the total error, by name, and which methods take them (peers of torchdiffeq share their forward pass too).
ESTIMATES: dict[str, Callable[[], Divergence]] = {
    "hadamard 8": partial(Hadamard, 8, 2),
    "hadamard 16": partial(Hadamard, 16, 2),
    "4 probes": partial(Hutchinson, 4),
    "16 probes": partial(Hutchinson, 16),
    "exact": Exact,
}
ESTIMATED = ["decoupled", "tsit5"]


class Given(Hutchinson):
    """Hutchinson's estimate with probes that are handed in."""

    def __init__(self, given: Tensor):
        super().__init__(given.shape[1])
        self.given = given

    def probes(self, *_: Any) -> Tensor:
        return self.given


# -- measurement -----------------------------------------------------------------------------------------------------


def graded(tolerance: float, finest: int = 64) -> LikelihoodPlan:
    """For one probe that stays the same along the trajectory, whose error only a finer grid makes smaller: points by tolerance."""
    points = {1e-1: 20, 1e-2: 28, 1e-3: 36, 1e-4: 40, 1e-5: 48, 1e-6: finest}
    near = min(points, key=lambda t: abs(torch.log(torch.tensor(t / tolerance))))
    return LikelihoodPlan(AngleWarp(0.01, 0.003), 2 * points[near], AngleWarp(0.005, 0.03), points[near])


_SURVEYS: dict[tuple[str, str], LikelihoodPlan] = {}


def surveyed(case: Case, divergence: Divergence) -> LikelihoodPlan:
    """The plan that a survey of the pilots gives, once for each problem and estimator."""
    key = (case.name, f"{type(divergence).__name__}{getattr(divergence, 'count', '')}")
    if key not in _SURVEYS:
        _SURVEYS[key] = plan_likelihood(case.model, (case.pilot or case).x, divergence=divergence)
    return _SURVEYS[key]


def ours(
    case: Case, name: str, tolerance: float, estimate: Callable[[], Divergence] | None = None
) -> Callable[..., Any]:
    """The public call, with given probes (None: exact trace), or with an estimate that draws its own from the seed."""
    options = dict(OURS[name])
    if name == "decoupled" and estimate is not None and estimate is not Exact:
        options["plan"] = surveyed(case, estimate())

    def run(x: Tensor, probes: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
        divergence = estimate() if estimate else Exact() if probes is None else Given(probes)
        if name == "decoupled" and isinstance(divergence, Given):
            options["plan"] = graded(tolerance)
        result = log_prob(case.model, x, divergence=divergence, rtol=tolerance, atol=tolerance, seed=seed, **options)
        return result.value, None if bool(result.stderr.isnan().all()) else result.stderr

    return run
