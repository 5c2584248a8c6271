r"""Sampling with few network evaluations: one scheme for every process, and the form that a tuned scheme has.

Layer 3. The coordinates are those of the angle path (`scoresde.flow`) with the data's mean taken out:
$u = (x/\alpha - \mu)/\sqrt{r^2 + c^2}$, $r = \sigma/\alpha$, $\theta = \arctan(r/c)$, and

$$\frac{du}{d\theta} = v = \cos\theta\,\hat\epsilon - \sin\theta\,(D - \mu)/c .$$

v vanishes for Gaussian data N(mu, c^2 I), and at r = infinity for any data. So a first move, from the prior to a smaller
noise level, costs no evaluation (u stays), and r = infinity is a node of every interpolating polynomial that is
known beforehand. A scheme with n evaluations at r_1 > ... > r_n, ending at r_{n+1}, is

$$u_1 = u_0, \qquad u_{i+1} = (1 + g_i)\,u_i + \sum_{j \le i} w_{ij}\,v_j ,$$

and `rule` chooses nodes and weights: nodes equally spaced in $\tau = (r/(r + 2c))^{1/3}$ from tau(infinity) = 1, weights by
integrating the polynomial in tau through the latest predictions against d theta (Adams-Bashforth), the first step
redone by the line between v = 0 at infinity and v_1 (no further evaluation), and for 13 evaluations or more each
step replaced by the mean of the explicit and the implicit formula (half a corrector, no further evaluation either).
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import ends_of
from scoresde.models.base import ScoreModel
from scoresde.models.prepared import combine
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State
from scoresde.samplers.exponential import Angle, Array, Points, affine_arrays
from scoresde.samplers.multistep import Multistep, Plan

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)
PANEL = 2.0  # longest panel of the quadrature, in units of log r


@dataclass(frozen=True)
class Scheme:
    """`r` (n + 1,), the noise levels sigma/alpha of the n evaluations and of the end; `gain` g (n,); `weights` w (n, n)."""

    r: Array
    gain: Array
    weights: Array

    @property
    def nfe(self) -> int:
        return len(self.gain)


@dataclass(frozen=True)
class Report:
    """What tuning gained, on `held_out` starts that it did not see; errors per dimension at the end, in x_0's units.

    `rms` and `median` (of the root mean square per trajectory), each before and after, against the teacher;
    `evaluations`, network evaluations spent on tuning, counted in examples; `gained`, whether there is a gain to claim.
    """

    nfe: int
    gained: bool
    rms: tuple[float, float]
    median: tuple[float, float]
    held_out: int
    evaluations: int

    def __str__(self) -> str:
        (a, b), (c, d) = self.rms, self.median
        return f"{self.nfe} NFE, {self.held_out} held-out starts: rms {a:.4g} -> {b:.4g}, median {c:.4g} -> {d:.4g}"


def tau(r: Array, c: float) -> Array:
    """(r / (r + 2c))^(1/3): 1 at infinity, and nearly a power of r below c."""
    return (1 + 2 * c / r) ** (-1 / 3)


def nodes(r_max: float, r_min: float, c: float, n: int) -> Array:
    """n + 1 decreasing noise levels equally spaced in tau: n evaluations, then r_min."""
    high, low = tau(np.array([r_max, r_min]), c)
    spaced = np.linspace(1.0, low, n + 2)[1:]
    if spaced[0] > high:  # so many evaluations that the first stands at r_max itself
        spaced = np.linspace(high, low, n + 1)
    cubed = spaced**3
    r = 2 * c * cubed / (1 - cubed)
    r[-1] = r_min
    return r


def integrals(start: float, end: float, knots: Array, c: float) -> Array:
    """Integrals d theta from r = start to r = end of the Lagrange polynomials in tau through `knots` (k,), infinity allowed."""
    edges = np.linspace(math.log(start), math.log(end), max(1, math.ceil(math.log(start / end) / PANEL)) + 1)
    half = 0.5 * np.diff(edges)[:, None]
    log_r = (0.5 * (edges[1:] + edges[:-1])[:, None] + half * _POINTS).ravel()
    mass = (half * _WEIGHTS).ravel() * Angle(c).density(log_r, log_r)
    at, known = tau(np.exp(log_r), c), tau(knots, c)
    factors = (at - known[:, None]) / (known[:, None, None] - known[:, None] + np.eye(len(known))[:, :, None])
    for j in range(len(known)):
        factors[j, j] = 1.0
    return factors.prod(1) @ mass


def rule(n: int) -> tuple[int, float]:
    """(order, share of the corrector) for n evaluations: on exact mixtures the best of those tried, at every n."""
    return (3, 0.0) if n <= 12 else (3, 0.5) if n < 20 else (4, 0.5)


def rule_weights(r: Array, c: float, r_max: float) -> Array:
    """w (n, n) of the untuned rule for nodes r (n + 1,)."""
    n = len(r) - 1
    order, share = rule(n)
    knots = np.concatenate([[math.inf], r[:-1]])
    state = np.zeros(n + 1)  # u_i - u_0 in terms of v at the knots, corrected as far as it will be
    predicted = np.zeros(n + 1)  # the same as it stands when evaluation i is made
    rows = []
    for i in range(1, n + 1):
        part = 1.0 if i == 1 else share
        corrected = state.copy()
        if part:
            first = i - 1 if i == 1 else i + 1 - min(order, i + 1)
            corrected[first : i + 1] += integrals(r_max if i == 1 else r[i - 2], r[i - 1], knots[first : i + 1], c)
        state = (1 - part) * predicted + part * corrected
        first = i + 1 - min(order, i + 1)
        following = state.copy()
        following[first : i + 1] += integrals(r[i - 1], r[i], knots[first : i + 1], c)
        rows.append(following - predicted)
        predicted = following
    return np.stack(rows)[:, 1:]


@functools.lru_cache(maxsize=256)
def untuned(r_max: float, r_min: float, c: float, n: int) -> Scheme:
    """The scheme of `rule` for n evaluations between two noise levels, for data of standard deviation c."""
    r = nodes(r_max, r_min, c, n)
    return Scheme(r, np.zeros(n), rule_weights(r, c, r_max))


class FewStep(Sampler):
    """The module's scheme: `method="auto"`, and what `scoresde.distill.solver` returns.

    `steps` is the number of network evaluations, exactly. Deterministic, and ends at t_min without a final denoiser.
    Arguments: `scheme`, a tuned one (then `steps` is its own number), or None for the rule; `c`, the data's standard
    deviation (None: the model's `sigma_data`); `mean`, the data's mean, shape of one example, or None for zero; `report`,
    what tuning gained.
    On a grid that is given it is `Multistep("angle", 3)`: every time but the last costs an evaluation.
    """

    default_steps = 10
    denoise_final = False

    def __init__(
        self,
        scheme: Scheme | None = None,
        c: float | None = None,
        mean: Tensor | None = None,
        report: Report | None = None,
    ):
        self.scheme = scheme
        self.report = report
        self.c = None if c is None else checks.positive(c, "c")
        self.mean = mean
        if scheme is not None:
            self.default_steps = scheme.nfe

    def scheme_for(self, model: ScoreModel, steps: int, t_max: float | None = None) -> Scheme:
        """The scheme of `steps` evaluations on the model's process. Raises `ValueError` if a tuned one has another number."""
        if self.scheme is not None:
            if steps != self.scheme.nfe:
                raise ValueError(f"this sampler was tuned for {self.scheme.nfe} evaluations, asked for {steps}.")
            return self.scheme
        ends = torch.tensor([model.sde.t_max if t_max is None else t_max, model.sde.t_min], dtype=torch.float64)
        r_max, r_min = torch.exp(-0.5 * model.sde.log_snr(ends)).tolist()
        return untuned(r_max, max(r_min, 1e-8 * r_max), self.scale(model), steps)

    def scale(self, model: ScoreModel) -> float:
        return model.sigma_data if self.c is None else self.c

    def times(self, model: ScoreModel, steps: int, t_max: float | None = None) -> Tensor:
        sde = model.sde
        start = float(ends_of(sde, steps, t_max)[0])
        inner = sde.time(torch.from_numpy(-2 * np.log(self.scheme_for(model, steps, t_max).r[:-1])))
        ends = torch.tensor([start, sde.t_min], dtype=torch.float64)
        if float(inner[0]) > start + 1e-9:
            raise ValueError(
                f"t_max = {start:g} lies below the first evaluation of this tuned sampler, t = {float(inner[0]):g}; leave it out."
            )
        inner = inner[inner < start - 1e-12] if float(inner[0]) > start - 1e-9 else inner
        return torch.cat([ends[:1], inner, ends[1:]])

    def start(self, model: ScoreModel, times: Tensor) -> State:
        c, points = self.scale(model), Points.of(model.sde, times)
        if self.mean is not None and model.event_shape is not None:
            checks.same_shape(self.mean, model.event_shape, "the mean that this sampler was tuned with (one example)")
        own = self._is_own(model, times)
        if own is None:
            return self._elsewhere(c).start(model, times)
        scheme, free = own
        at = points[1:] if free else points
        p, q = Angle(c).combination(affine_arrays(model, torch.from_numpy(at.t)), at)
        size = np.hypot(at.sigma, at.alpha * c)
        sine = at.sigma / size  # sin(theta) = sigma/size, with the mean's part of v: sin(theta) mean / c
        keep = (1 + scheme.gain) * size[1:] / size[:-1]
        weights = size[1:, None] * scheme.weights
        shift = at.alpha[1:] - keep * at.alpha[:-1] + weights @ (sine[:-1] / c)
        table: dict[tuple[float, float], Any] = {}
        moments = times.tolist()
        if free:
            ratio = float(
                np.hypot(points.sigma[1], points.alpha[1] * c) / np.hypot(points.sigma[0], points.alpha[0] * c)
            )
            table[moments[0], moments[1]] = (ratio, float(points.alpha[1] - ratio * points.alpha[0]))
        for i, (t, s) in enumerate(zip(at.t[:-1].tolist(), at.t[1:].tolist(), strict=True)):
            row = [(j, float(w)) for j, w in enumerate(weights[i, : i + 1]) if w]
            table[t, s] = (float(p[i]), float(q[i]), float(keep[i]), row, float(shift[i]))
        return State(table, [])

    def _is_own(self, model: ScoreModel, times: Tensor) -> tuple[Scheme, bool] | None:
        """(scheme, whether its first interval is free) if `times` are this sampler's own."""
        t_max = float(times[0])
        for n, free in ((times.numel() - 2, True), (times.numel() - 1, False)):
            if n >= 1 and (self.scheme is None or self.scheme.nfe == n):
                expected = self.times(model, n, t_max)
                if expected.shape == times.shape and torch.equal(expected, times):
                    return self.scheme_for(model, n, t_max), free
        return None

    def _elsewhere(self, c: float) -> Multistep:
        """Off its own nodes, where infinity is no useful node: plain Adams in the same coordinates."""
        if self.scheme is not None:
            raise ValueError(
                "a tuned sampler runs on its own noise levels; leave out grid and single steps of other lengths."
            )
        return Multistep(Angle(c), 3)

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        plan = state.table.get((t, s))
        if plan is None or isinstance(plan, Plan):  # on a given grid, or a single step outside the loop
            return self._elsewhere(self.scale(model)).step(model, x, t, s, state, noise, cond)
        if len(plan) == 2:  # the free move
            keep, shift = plan
            x = x * keep
        else:
            p, q, keep, row, shift = plan
            state.memory.append(combine(p, x, q, model.output(x, t, cond)))
            x = torch.mul(x, keep)
            for j, w in row:
                x.add_(state.memory[j], alpha=w)
        return x if self.mean is None else x.add_(self.mean.to(x), alpha=shift)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, header) that `from_tensors` makes the same sampler of. Raises `ValueError` without a scheme."""
        if self.scheme is None:
            raise ValueError("there is nothing to save: this sampler follows the untuned rule, method='auto'.")
        tensors = {name: torch.from_numpy(getattr(self.scheme, name)) for name in ("r", "gain", "weights")}
        if self.mean is not None:
            tensors["mean"] = self.mean
        return tensors, {"c": self.c, "report": None if self.report is None else asdict(self.report)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> FewStep:
        """The sampler that `to_tensors` described."""
        scheme = Scheme(*(tensors[name].double().cpu().numpy() for name in ("r", "gain", "weights")))
        report = header["report"]
        if report is not None:
            report = Report(**{k: tuple(v) if isinstance(v, list) else v for k, v in report.items()})
        return cls(scheme, header["c"], tensors.get("mean"), report)
