"""Decoupled solves, refined example by example until their errors are small enough.

Layer 3. The grids of a pass are the same for all examples, so a pass needs no look at its numbers while it runs. After it every
example has an error of its own: those above the tolerance go through a finer pass, whatever their batch-mates do, so an
example's result does not depend on its batch. With estimated traces, further rounds of probes run along the same trajectories.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import conditions, ode
from scoresde.likelihood.decoupled.quadrature import FlowTrajectory, Integral, LikelihoodPlan
from scoresde.likelihood.decoupled.trajectory import AngleWarp
from scoresde.likelihood.divergence import Divergence, Exact
from scoresde.models.base import ScoreModel
from scoresde.models.prepared import network_dtype
from scoresde.rng import Streams

LARGE_BATCH = 8192  # entries of a batch from which derivatives are taken in parts
NATS_PER_TOLERANCE = 10.0
DIGITS = 14.0  # more decimals than float64 sums of so many terms have
MAX_PASSES = 4  # few, because a pass of few examples costs almost as much as one of many
REFINEMENT_RATIO = 2.25
SOLVER_TOLERANCE = 0.02  # nats per sqrt(d): solver errors below this are not refined where the trace is estimated
TRACE_VARIABLE = AngleWarp(
    0.03, 0.3
)  # points of estimated traces are about even in what their probes' noise contributes
TRAJECTORY_NODES = 36  # of the trajectory, where each point of the quadrature costs many products
MIN_ESTIMATES = 6  # independent estimates of the trace before their scatter is believed


@dataclass
class Refinement:
    """Per example: `change` (B,), the mean estimate of log p(start) - log p(end); `stderr` of it from the trace; `trajectory_error`
    and `quadrature_error`, what these two may have left in it, nats; `latent` (B, *); `nfe`; `status`; `level` (B,), which of
    `plans` it ended with."""

    change: Tensor
    stderr: Tensor
    trajectory_error: Tensor
    quadrature_error: Tensor
    latent: Tensor
    nfe: Tensor
    status: Tensor
    level: Tensor
    plans: list[LikelihoodPlan]

    @classmethod
    def empty(cls, x: Tensor) -> Refinement:
        """For the examples x (B, *), nothing known yet."""
        nan = torch.full((x.shape[0],), math.nan, dtype=torch.float64, device=x.device)
        whole = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        nans, wholes = (nan, nan.clone(), nan.clone(), nan.clone()), (whole, whole.clone(), whole.clone())
        return cls(*nans, torch.zeros_like(x), *wholes, [])

    def put(self, rows: Tensor, **values: Tensor) -> None:
        """Write values of some rows."""
        for name, value in values.items():
            getattr(self, name)[rows] = value


def tolerance_of(rtol: float, atol: float) -> float:
    """The error in nats per example that tolerances of a solver stand for."""
    return NATS_PER_TOLERANCE * (rtol + atol)


def default_plan(model: ScoreModel, tolerance: float, exact: bool) -> LikelihoodPlan:
    """Where refinement starts, by the tolerance in nats.

    With an exact trace as many nodes as points, so many that some four of five examples need no second pass (found on
    mixtures and on a learned network in 2D). An estimated trace costs many products a point and has noise that hides
    small errors: the points are few, the nodes many.
    """
    stretch, digits = AngleWarp(*model.flow_scales), min(max(1.0, -math.log10(tolerance)), DIGITS)
    if not exact:
        return LikelihoodPlan(stretch, TRAJECTORY_NODES, TRACE_VARIABLE, 24)
    smooth = model.flow_mismatch < 0.05
    points = round(12 + 9 * digits if smooth else 16 + 12 * digits)
    return LikelihoodPlan(stretch, round(0.8 * points) if smooth else points, AngleWarp(*model.trace_scales), points)


def refine(
    model: ScoreModel,
    x: Tensor,
    divergence: Divergence,
    streams: Streams,
    *,
    tolerance: float,
    stderr: float | None,
    max_nfe: int,
    plan: LikelihoodPlan | None,
    cond: Any,
) -> Refinement:
    """The change of log density along the flow of x (B, *), each example to `tolerance` nats, and to `stderr` where given.

    With estimated traces the solver's own error is not held below `SOLVER_TOLERANCE` sqrt(d) nats, or a third of `stderr`.
    """
    exact = isinstance(divergence, Exact)
    floor, out = _floor(model, x), Refinement.empty(x)
    if not x.shape[0]:
        return out
    rows = torch.arange(x.shape[0], device=x.device)
    before = torch.full_like(out.change, math.inf)
    goal = tolerance
    if not exact:
        hidden = SOLVER_TOLERANCE * math.sqrt(x[0].numel())
        goal = max(tolerance, hidden if stderr is None else min(hidden, stderr / 3))
    whole = plan or default_plan(model, tolerance, exact)
    here = _thinned(whole, max_nfe)
    for level in range(MAX_PASSES):
        out.plans.append(here)
        path = FlowTrajectory(model, x[rows], here, conditions.take_rows(cond, rows), rows)
        integral = _integral(path, divergence, streams, rows, [level] if level else [])
        mean, error = mean_and_error(integral.change, exact)
        out.nfe[rows] += here.nfe
        out.put(rows, change=mean, stderr=error, latent=path.latent, level=torch.full_like(rows, level))
        out.put(rows, trajectory_error=integral.trajectory_error, quadrature_error=integral.quadrature_error)
        solver = integral.trajectory_error + (integral.quadrature_error if exact else 0.0)
        stalled = (solver > 0.5 * before) & (solver < floor)  # rounding: more evaluations would not help
        if not exact and here.nfe < whole.nfe:  # what a thinner rule leaves cannot be seen in estimated traces
            out.status[rows] = ode.MAX_NFE
            return out
        failed = ~(torch.isfinite(mean) & ((solver <= goal) | stalled))
        if stderr is not None and not exact:
            _add_estimates(out, path, integral, rows, ~failed, divergence, streams, (level, stderr, max_nfe))
        rows, before, here = rows[failed], solver[failed], here.finer(REFINEMENT_RATIO, REFINEMENT_RATIO)
        if not len(rows):
            return out
        if int(out.nfe[rows].max()) + here.nfe > max_nfe:
            out.status[rows] = ode.MAX_NFE
            return out
    out.status[rows] = ode.UNRESOLVED
    return out


def _integral(
    path: FlowTrajectory, divergence: Divergence, streams: Streams, rows: Tensor, key: Sequence[int], **options: Any
) -> Integral:
    """`path.integrate`, an eighth of a large batch at a time: its graphs hold what a forward evaluation lets go."""
    n = len(rows)
    if n * path.d <= LARGE_BATCH:
        return path.integrate(divergence, streams.source(rows, *key), **options)
    found = []
    for i, part in enumerate(torch.arange(n, device=rows.device).split(math.ceil(n / 8))):
        source = streams.source(rows[part], *key, part=i)
        found.append(path.take_rows(part).integrate(divergence, source, **options))
    return Integral(*(torch.cat(values) for values in zip(*found, strict=True)))


def _add_estimates(
    out: Refinement,
    path: FlowTrajectory,
    first: Integral,
    rows: Tensor,
    chosen: Tensor,
    divergence: Divergence,
    streams: Streams,
    limits: tuple[int, float, int],
) -> None:
    """Rounds of new probes along the same trajectories, until each of the chosen examples has its standard error.

    The estimates are independent, so their scatter gives the error; a few can agree by accident, so `MIN_ESTIMATES` are asked for,
    and what they show is raised by the spread of such a scatter before it is compared.
    """
    level, goal, max_nfe = limits
    points = path.plan.points
    index = chosen.nonzero().squeeze(1)
    if not len(index):
        return
    estimates = first.change[index]
    for number in range(1, max_nfe):
        mean, error = mean_and_error(estimates, exact=False)
        out.put(rows[index], change=mean, stderr=error)
        k = estimates.shape[1]
        short = (
            ~(error * math.sqrt((k + 1) / max(k - 1, 1)) <= goal)
            if k >= MIN_ESTIMATES
            else torch.ones_like(index).bool()
        )
        within = out.nfe[rows[index]] + points <= max_nfe
        index, estimates = index[short & within], estimates[short & within]
        if not len(index):
            return
        more = _integral(
            path.take_rows(index), divergence, streams, rows[index], [level, number], first=number * points
        )
        estimates = torch.cat([estimates, more.change], 1)
        out.nfe[rows[index]] += points


def differentiable_change(
    model: ScoreModel, x: Tensor, divergence: Divergence, streams: Streams, found: Refinement, cond: Any
) -> tuple[Tensor, Tensor]:
    """(change (B,), latent (B, *)) once more with the grids that `found` ended with, and with the graph to x and the parameters."""
    parts, latents, order = [], [], []
    for level, plan in enumerate(found.plans):
        rows = (found.level == level).nonzero().squeeze(1)
        if len(rows):
            path = FlowTrajectory(model, x[rows], plan, conditions.take_rows(cond, rows), rows)
            integral = _integral(path, divergence, streams, rows, [level] if level else [], differentiable=True)
            parts.append(integral.change.mean(1))
            latents.append(path.latent)
            order.append(rows)
    back = torch.cat(order).argsort()
    return torch.cat(parts)[back], torch.cat(latents)[back]


def _thinned(plan: LikelihoodPlan, max_nfe: int) -> LikelihoodPlan:
    """The plan, thinned to a budget of evaluations (four at least)."""
    share = 1.0
    thin = plan
    while thin.nfe > max_nfe and (thin.points > 2 or thin.nodes > 2):
        share *= 0.9 * min(1.0, max_nfe / thin.nfe)
        nodes, points = (max(2, int(n * share)) for n in (plan.nodes, plan.points))
        thin = dataclasses.replace(plan, nodes=nodes, points=points, quadrature_error=math.nan)
    return thin


def _floor(model: ScoreModel, x: Tensor) -> float:
    """Nats below which an error that refinement does not reduce is taken for rounding."""
    eps = max(torch.finfo(v).eps for v in (network_dtype(model, x), x.dtype))
    return 50 * math.sqrt(eps)


def rounding_error(model: ScoreModel, x: Tensor) -> float:
    """Nats that a network in less than float32 leaves in a log density of x (B, *), eps sqrt(d); 0 for other networks.

    Networks of 2 to 256 dimensions in bfloat16 and float16 left a fifth to four fifths of it, rms, beside their float64 copies.
    """
    eps = torch.finfo(network_dtype(model, x)).eps
    return eps * math.sqrt(math.prod(x.shape[1:])) if eps > torch.finfo(torch.float32).eps else 0.0


def mean_and_error(estimates: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Mean (B,) of independent estimates (B, k) and its standard error: 0 for exact ones, NaN for a single one."""
    mean, k = estimates.mean(1), estimates.shape[1]
    if exact:
        return mean, torch.zeros_like(mean)
    return mean, estimates.std(1) / math.sqrt(k) if k > 1 else torch.full_like(mean, math.nan)
