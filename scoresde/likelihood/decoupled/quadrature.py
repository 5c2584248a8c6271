r"""Log densities with the trajectory and its divergence computed apart.

Layer 3. A solve that carries the trace along needs its probes fixed, and one probe's error dwarfs that of the solver. Here the
trajectory is solved first, by forward evaluations alone (`trajectory`), and the divergence is integrated along it afterwards, by
Gauss-Legendre quadrature with new probes at every node, whose errors average out. For *any* smooth curve U, solution or not,

$$\log p_{low}(U_{low}) = \log p_{high}(U_{high}) + \int \left[\mathrm{tr}\frac{\partial f}{\partial u}(U)
  + g(U)\cdot(f(U) - U')\right] d\theta, \qquad g = \nabla_u \log p_\theta = -\hat\epsilon/\sin\theta,$$

because $\partial_\theta \log p = -\nabla\cdot(p f)/p$. The first term is the instantaneous change of variables (Chen et al. 2018,
theorem 1), which is all there is on a solution; the second takes away, to first order and from numbers that are at hand, what the
trajectory's own error does to the value. With a network's score for g what remains is of second order, or as small as
the network's score is near the gradient of its flow's density.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import numbers
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde import checks, conditions
from scoresde.flow import AnglePath
from scoresde.likelihood.decoupled.trajectory import (
    AngleWarp,
    Array,
    Field,
    QuadratureRule,
    equispaced,
    evaluations,
    gauss_legendre,
    trace_curve,
)
from scoresde.likelihood.divergence import Divergence, Exact
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource
from scoresde.sde import sum_event

SMALL = 0.125  # nats per sqrt(d) of correction up to which its error is taken for the mismatch's share of it
LARGEST = 5000  # nodes or points: their matrices grow with the square
RUNAWAY = 1e4  # a slope of this size, where states have unit variance, is the solver's doing


@dataclass(frozen=True)
class LikelihoodPlan:
    """Where a decoupled solve looks: `nodes` of the trajectory, equally spaced in `stretch`, and `points` of the quadrature, a
    Gauss-Legendre rule in `measure`; `quadrature_error`, the rule's own error in nats where a survey measured it."""

    stretch: AngleWarp
    nodes: int
    measure: AngleWarp
    points: int
    quadrature_error: float = math.nan

    def __post_init__(self) -> None:
        for name in ("stretch", "measure"):
            if not isinstance(getattr(self, name), AngleWarp):
                raise TypeError(f"{name} must be an AngleWarp(a, b), got {getattr(self, name)!r}.")
        for name in ("nodes", "points"):
            if not 2 <= checks.positive_int(getattr(self, name), name) <= LARGEST:
                raise ValueError(f"{name} must be at least 2 and at most {LARGEST}, got {getattr(self, name)}.")
        if isinstance(self.quadrature_error, bool) or not isinstance(self.quadrature_error, numbers.Real):
            raise TypeError(f"quadrature_error must be a number of nats, or NaN, got {self.quadrature_error!r}.")

    @property
    def nfe(self) -> int:
        """Evaluations of the network per example, each of the points' with vector-Jacobian products."""
        return evaluations(self.nodes) + self.points

    def finer(self, nodes: float, points: float) -> LikelihoodPlan:
        """That many times as many of each, as far as a plan goes."""
        nodes, points = (min(math.ceil(v), LARGEST) for v in (nodes * self.nodes, points * self.points))
        return LikelihoodPlan(self.stretch, nodes, self.measure, points)


class FlowTrajectory:
    """The trajectories of x (B, *) under a plan, along which divergences can be integrated as often as need be.

    `latent` (B, *), where they end; `rows` (B,), what errors call the examples. Raises `NonFiniteError`, naming t and the examples,
    for NaN from the network.
    """

    def __init__(
        self, model: ScoreModel, x: Tensor, plan: LikelihoodPlan, cond: Any = None, rows: Tensor | None = None
    ):
        self.model, self.plan, self.cond = model, plan, cond
        self.rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows
        self.path, self.d = AnglePath(model.sde, model.sigma_data), math.prod(x.shape[1:])
        self.ends = (model.sde.t_min, model.flow_end)
        self.low, self.high = (float(self.path.angle(t)) for t in self.ends)
        small, large = (float(self.path.scale(t)) for t in self.ends)
        self.growth = self.d * math.log(large / small)
        self.u = x / small
        theta, spacing = equispaced(plan.stretch, self.low, self.high, plan.nodes)
        field = Field(model, self.path, self.u, theta, self.ends, cond)
        self.curve = trace_curve(field, plan.stretch, self.u, theta, spacing)
        self.latent = self.curve.end * large
        size = self.curve.slopes.detach().flatten(2).abs().amax(2)
        _raise_if_broken(size, field, self.rows)
        self.ran_away = ~(size.amax(0) < RUNAWAY)  # (B,): on a grid too coarse for a stiff network

    def take_rows(self, rows: Tensor) -> FlowTrajectory:
        """The same trajectories, of the chosen examples only."""
        chosen = copy.copy(self)
        chosen.u, chosen.latent, chosen.cond = self.u[rows], self.latent[rows], conditions.take_rows(self.cond, rows)
        chosen.ran_away, chosen.rows = self.ran_away[rows], self.rows[rows]
        chosen.curve = dataclasses.replace(self.curve, u=chosen.u, slopes=self.curve.slopes[:, rows])
        return chosen

    def integrate(
        self, divergence: Divergence, source: RandomSource, first: int = 0, differentiable: bool = False
    ) -> Integral:
        """The log density's change along the curve, by plan.points evaluations with probes from `source`.

        `first`: how many points earlier rounds have visited, so that a sequence of orthogonal probes goes on where it stopped.
        """
        rule, trace, correction = self.integrand(divergence, source, first, differentiable)
        weights = torch.from_numpy(rule.weights).to(self.u.device)
        change = torch.tensordot(weights, trace, 1) + torch.tensordot(weights, correction, 1)[:, None]
        defect = torch.tensordot(weights, correction.detach().abs(), 1)
        quadrature = torch.full_like(defect, self.plan.quadrature_error)
        if isinstance(divergence, Exact):
            quadrature = rule_error(trace[:, :, 0] + correction, rule, self.plan.measure)
        # a correction that is no small one has no small error either
        left = self.model.flow_mismatch * defect + (defect - SMALL * math.sqrt(self.d)).clamp_min(0)
        return Integral(change + self.growth, left, quadrature)

    def integrand(
        self, divergence: Divergence, source: RandomSource, first: int = 0, differentiable: bool = False
    ) -> tuple[QuadratureRule, Tensor, Tensor]:
        """The rule, and at its points (Q, B, k) estimates of tr df/du and (Q, B) the correction g . (f - U')."""
        probes = divergence.probe_sequence(self.u.shape, self.u.dtype, source)
        rule = gauss_legendre(self.plan.measure, self.low, self.high, self.plan.points)
        places, rates = self.curve.at(rule.theta)
        field = Field(self.model, self.path, self.u, rule.theta, self.ends, self.cond)
        traces, corrections, graph = [], [], {"differentiable": True} if differentiable else {}
        for j, angle in enumerate(rule.theta.tolist()):
            state = self.u + torch.tensordot(places[j], self.curve.slopes, 1)
            slope = torch.tensordot(rates[j], self.curve.slopes, 1)
            moving, trace = divergence(functools.partial(field.moving, j=j), state, probes(first + j), **graph)
            f = field.whole(state, moving, j)
            traces.append(field.p[j] * self.d + field.r[j] * trace)
            gradient = -(state + f / math.tan(angle))
            corrections.append(sum_event(gradient.double() * (f - slope).double()))
        trace, correction = torch.stack(traces), torch.stack(corrections)
        _raise_if_broken(correction.detach().abs(), field, self.rows, self.ran_away)
        return rule, trace, correction


class Integral(NamedTuple):
    """`change` (B, k), k estimates of log p(start) - log p(end) in nats; `trajectory_error` (B,), what the trajectory's error may
    have left in it: the size of the correction times the model's `flow_mismatch`; `quadrature_error` (B,), the rule's own error,
    which only exact traces show; the plan's for estimated ones, NaN where it has none."""

    change: Tensor
    trajectory_error: Tensor
    quadrature_error: Tensor


def rule_error(integrand: Tensor, rule: QuadratureRule, stretch: AngleWarp) -> Tensor:
    """Estimated error (B,) of a Gauss-Legendre rule from its integrand (Q, B) with respect to theta.

    The integrand's Legendre coefficients in s decay geometrically where it is smooth, and the rule is exact up to degree
    2Q - 1: with the last coefficients of size q and the largest p, its error would be of the size q^2/p. What is left of the
    curve's own ripples decays more slowly, so the power is 3/2, and the eighth of that which covers what was seen.
    """
    per_s = integrand.detach() * torch.from_numpy(1 / stretch.slope(rule.theta)).to(integrand.device)[:, None]
    length = float((rule.weights * stretch.slope(rule.theta)).sum())
    size = (torch.from_numpy(legendre(len(rule.theta))).to(integrand.device) @ per_s).abs()
    tail, top = size[-4:].amax(0), size.amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    return length * tail * (tail / top).sqrt() / 8


@functools.lru_cache(maxsize=64)
def legendre(points: int) -> Array:
    """Matrix from values at Gauss-Legendre nodes to the coefficients of P_0 .. P_{points-1}."""
    z, w = np.polynomial.legendre.leggauss(points)
    return (np.polynomial.legendre.legvander(z, points - 1) * w[:, None]).T * (np.arange(points) + 0.5)[:, None]


def _raise_if_broken(size: Tensor, field: Field, names: Tensor, ran_away: Tensor | None = None) -> None:
    """`NonFiniteError` where the network answered NaN or infinity; `size` (N, B) of what came at each place.

    Trajectories that ran away first, or before (`ran_away`), are left to be refined.
    """
    if not size.numel() or bool(torch.isfinite(size).all()):
        return
    bad = ~torch.isfinite(size)
    first = bad.double().argmax(0)
    before = size.gather(0, (first - 1).clamp_min(0)[None])[0]
    broken = bad.any(0) & ((first == 0) | (before < RUNAWAY))
    if ran_away is not None:
        broken &= ~ran_away
    rows = broken.nonzero().flatten().tolist()
    if rows:
        at = int(first[rows[0]])
        raise checks.NonFiniteError(
            f"the network returned NaN or infinity at t = {field.times[at]:.6g}, evaluation {at}, rows "
            f"{checks.rows_text(names[rows].tolist())}. Check the network's output at that t."
        )
