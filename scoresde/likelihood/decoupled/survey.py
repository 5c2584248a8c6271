"""Where a decoupled solve should look, found on a few examples.

Layer 3. No variable and no number of points serves every network: one that knows its data are integers has a divergence with
sharper features than a smooth mixture. With estimated traces the quadrature's error hides in the probes' noise and cannot be seen
in a result, so it is measured beforehand: a few examples are solved with a fine rule and probes that stay the same, which leaves a
smooth integrand, and every candidate rule is tried on it by interpolation, without another evaluation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde import checks
from scoresde.latents import decode
from scoresde.likelihood.decoupled.quadrature import FlowTrajectory, LikelihoodPlan, legendre
from scoresde.likelihood.decoupled.refinement import default_plan, tolerance_of
from scoresde.likelihood.decoupled.trajectory import AngleWarp, gauss_legendre
from scoresde.likelihood.divergence import (
    Divergence,
    Exact,
    Hutchinson,
    ProbeSequence,
    check_divergence,
    default_divergence,
)
from scoresde.models.base import ScoreModel, check_input, require_model
from scoresde.modes import device_of, dtype_of, evaluating
from scoresde.rng import RandomSource, Seed

MEASURES = [AngleWarp(a, b) for a in (0.003, 0.01, 0.03, 0.1) for b in (0.03, 0.1, 0.3, 1.0)]
POINTS = (16, 20, 24, 28, 32, 40, 48, 56, 64)
FINE = (AngleWarp(0.01, 0.05), 96)
GAIN = 0.1  # variance left of independent probes' by a sequence of orthogonal ones (digits networks: 0.08 to 0.15)
GOAL = 0.01  # nats per sqrt(d) that a rule may leave where the trace is estimated
ROWS = 8
SALT = 5


class _FixedProbes(Hutchinson):
    """The same sign vectors at all places."""

    def probe_sequence(self, shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> ProbeSequence:
        probes = self.probes(shape, dtype, source)
        return lambda place: probes


def plan_likelihood(
    model: ScoreModel,
    x: Tensor | None = None,
    *,
    divergence: Divergence | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    seed: Seed = 0,
    cond: Any = None,
) -> LikelihoodPlan:
    """The `plan` for `log_prob` that serves this model best, from a survey on x (B, *): eight examples are enough.

    Without x the model draws them itself, by the probability flow; it has to know its `event_shape` then. Use other examples than
    those to be scored. The trajectory's grid is the model's own; the rule is chosen as follows. Exact trace: the fewest points
    whose error is below the tolerance 10 (rtol + atol) nats in nine of ten examples. Estimated trace: the fewest points, from 24
    on, that some variable integrates to 0.01 sqrt(d) nats rms, in the variable where this error and that of the probes are
    smallest together (`plan.quadrature_error`, nats rms, is the former).
    The survey costs about 40 evaluations and 96 with two products each (d for an exact trace) for every example of x.
    """
    require_model(model)
    for name, value in (("rtol", rtol), ("atol", atol)):
        checks.positive(value, name)
    check_divergence(divergence)
    if x is None and cond is not None:
        raise ValueError("with cond= the survey needs examples that belong to it: pass x.")
    if x is None:
        x = model_examples(model, ROWS, seed)
    check_input(model, x, cond)
    if not x.shape[0]:
        raise ValueError("x is empty; a survey needs at least one example.")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    divergence = default_divergence(math.prod(x.shape[1:])) if divergence is None else divergence
    exact, tolerance = isinstance(divergence, Exact), tolerance_of(rtol, atol)
    start, goal = default_plan(model, tolerance, exact), GOAL * math.sqrt(x[0].numel())
    with evaluating(model):
        path = FlowTrajectory(model, x, dataclasses.replace(start, measure=FINE[0], points=FINE[1]), cond)
        errors, noise = survey(
            path, divergence if exact else _FixedProbes(2), RandomSource(seed, x.device, len(x), salt=SALT)
        )
    rms = {rule: math.sqrt(float(e.square().mean())) for rule, e in errors.items()}
    if exact:
        good = [rule for rule, e in errors.items() if float(e.abs().quantile(0.9)) <= tolerance]
        if not good:
            return dataclasses.replace(start, measure=min(rms, key=lambda rule: rms[rule])[0])
        measure, points = min(good, key=lambda rule: (rule[1], rms[rule]))
        nodes = max(points, start.nodes) if model.flow_mismatch >= 0.05 else start.nodes
        return dataclasses.replace(
            start, nodes=nodes, measure=measure, points=points, quadrature_error=rms[measure, points]
        )
    probes = getattr(divergence, "count", 1)
    best = {
        points: min(MEASURES, key=lambda m: rms[m, points] ** 2 + GAIN * noise[m, points] / probes)
        for points in POINTS
        if points >= start.points
    }
    fine = [points for points, m in best.items() if rms[m, points] <= goal]
    points = fine[0] if fine else max(best)
    return dataclasses.replace(start, measure=best[points], points=points, quadrature_error=rms[best[points], points])


def model_examples(model: ScoreModel, n: int, seed: Seed) -> Tensor:
    """n examples of the model's own, by its probability flow at a loose tolerance."""
    if model.event_shape is None:
        raise ValueError("the model does not say what shape its examples have (event_shape); pass a few examples as x.")
    checks.positive_int(n, "n")
    device = device_of(model)
    source = RandomSource(seed, device, n, salt=SALT)
    z = source.normal((n, *model.event_shape), dtype_of(model)) * model.sde.prior_std
    return decode(model, z, rtol=1e-3, atol=1e-3)


def survey(
    path: FlowTrajectory, divergence: Divergence, source: RandomSource
) -> tuple[dict[tuple[AngleWarp, int], Tensor], dict[tuple[AngleWarp, int], float]]:
    """Of every candidate rule (measure, points): its error (B,) in nats on the integrand that the trajectories' own fine rule
    shows, and the mean variance that independent single probes at its points would add."""
    rule, trace, correction = path.integrand(divergence, source)
    trace, correction = trace.cpu(), correction.cpu()
    measure, integrand = path.plan.measure, trace.mean(2) + correction
    rates = torch.from_numpy(measure.slope(rule.theta))
    expand = torch.from_numpy(legendre(len(rule.theta)))
    coefficients = expand @ (integrand / rates[:, None])
    whole = torch.tensordot(torch.from_numpy(rule.weights), integrand, 1)
    scatter = trace.var(2).mean(1) if trace.shape[2] > 1 else torch.zeros(len(rates), dtype=torch.float64)
    low, high = measure(np.array([path.low, path.high]))
    errors, noise = {}, {}
    for candidate in MEASURES:
        for points in POINTS:
            there = gauss_legendre(candidate, path.low, path.high, points)
            z = 2 * (measure(there.theta) - low) / (high - low) - 1
            weights = there.weights * measure.slope(there.theta)
            row = torch.from_numpy(weights @ np.polynomial.legendre.legvander(z, len(rule.theta) - 1))
            errors[candidate, points] = row @ coefficients - whole
            local = np.interp(there.theta, rule.theta, scatter.numpy())
            noise[candidate, points] = float(np.sum(there.weights**2 * local))
    return errors, noise
