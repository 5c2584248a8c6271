r"""Sampling with few network evaluations: one scheme for every process, and the form that a tuned scheme has.

Layer 3. The coordinates are those of the angle path (`scoresde.flow`) with the data's mean taken out:
$u = (x/\alpha - \mu)/\sqrt{r^2 + c^2}$, $r = \sigma/\alpha$, $\theta = \arctan(r/c)$, and

$$\frac{du}{d\theta} = v = \cos\theta\,\hat\epsilon - \sin\theta\,(D - \mu)/c .$$

v vanishes for Gaussian data N(mu, c^2 I), and at r = infinity for any data. So where the mean is known a first move, from the
prior to a smaller noise level, costs no evaluation (u stays), and r = infinity is a node of every interpolating polynomial
that is known beforehand. Where it is not known the first evaluation, at the start, finds it. A scheme with n evaluations at
r_1 > ... > r_n, ending at r_{n+1}, is

$$u_1 = u_0, \qquad u_{i+1} = (1 + g_i)\,u_i + \sum_{j \le i} w_{ij}\,v_j ,$$

and `rule` chooses nodes and weights: nodes equally spaced in $\tau = (r/(r + R))^{1/3}$ from tau(infinity) = 1, with
$R = 0.7\,c\sqrt d$ for examples of d numbers; weights by integrating the polynomial in tau through the latest predictions against
d theta (Adams-Bashforth), the first step redone by the line between v = 0 at infinity and v_1 (no further evaluation), and for 8
evaluations or more each step replaced by the mean of the explicit and the implicit formula (half a corrector, no further
evaluation either).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scoresde import checks
from scoresde.flow import rotation
from scoresde.grids import ends_of
from scoresde.models.base import ScoreModel
from scoresde.numerics import Array, lagrange_integrals, legendre
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State, data_spread
from scoresde.samplers.exponential import Angle, Points, affine_arrays
from scoresde.samplers.multistep import History, HistorySampler, Multistep, MultistepRow

QUADRATURE = 16  # points of the quadrature in each panel
PANEL = 2.0  # longest panel of the quadrature, in units of log r
EXACT = 0.05  # `flow_mismatch` below which a model's denoiser is taken for exact
REACH = 0.7  # the R of tau over the spread of the data


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


def tau(r: Array, reach: float) -> Array:
    """(r / (r + R))^(1/3): 1 at infinity, and nearly a power of r below R = reach."""
    return (1 + reach / r) ** (-1 / 3)


def nodes(r_max: float, r_min: float, reach: float, n: int) -> Array:
    """n + 1 decreasing noise levels equally spaced in tau: n evaluations, then r_min."""
    high, low = tau(np.array([r_max, r_min]), reach)
    spaced = np.linspace(1.0, low, n + 2)[1:]
    if spaced[0] > high:  # so many evaluations that the first stands at r_max itself
        spaced = np.linspace(high, low, n + 1)
    cubed = spaced**3
    r = reach * cubed / (1 - cubed)
    r[-1] = r_min
    return r


def integrals(start: float, end: float, knots: Array, c: float, reach: float) -> Array:
    """Integrals d theta from r = start to r = end of the Lagrange polynomials in tau through `knots` (k,), infinity allowed."""
    edges = np.linspace(math.log(start), math.log(end), max(1, math.ceil(math.log(start / end) / PANEL)) + 1)
    half = 0.5 * np.diff(edges)[:, None]
    at, weights = legendre(QUADRATURE)
    log_r = (0.5 * (edges[1:] + edges[:-1])[:, None] + half * at).ravel()
    mass = (half * weights).ravel() * Angle(c).density(log_r, log_r)
    return lagrange_integrals(tau(knots, reach), tau(np.exp(log_r), reach), mass)


def rule(n: int) -> tuple[int, float]:
    """(order, share of the corrector) for n evaluations, chosen on exact mixtures and on a network of 784 dimensions."""
    return (3, 0.0) if n <= 7 else (3, 0.5) if n < 40 else (4, 0.5)


def rule_weights(r: Array, c: float, reach: float, r_max: float) -> Array:
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
            start = r_max if i == 1 else r[i - 2]
            corrected[first : i + 1] += integrals(start, r[i - 1], knots[first : i + 1], c, reach)
        state = (1 - part) * predicted + part * corrected
        first = i + 1 - min(order, i + 1)
        following = state.copy()
        following[first : i + 1] += integrals(r[i - 1], r[i], knots[first : i + 1], c, reach)
        rows.append(following - predicted)
        predicted = following
    return np.stack(rows)[:, 1:]


@functools.lru_cache(maxsize=256)
def untuned(r_max: float, r_min: float, c: float, reach: float, n: int) -> Scheme:
    """The scheme of `rule` for n evaluations between two noise levels, for data of standard deviation c."""
    if n == 0:  # only the mean is asked for, and u stays
        return Scheme(np.array([r_min]), np.zeros(0), np.zeros((0, 0)))
    r = nodes(r_max, r_min, reach, n)
    return Scheme(r, np.zeros(n), rule_weights(r, c, reach, r_max))


class FewStep(HistorySampler):
    r"""The module's scheme: `method="auto"`, and what `scoresde.tune` returns.

    $$x_s = A\,x_t + \sum_j w_j\,v_j + a\,\mu, \qquad v_j = \cos\theta_j\,\hat\epsilon_j - \sin\theta_j\,D_j/c,$$

    the step of the module's docstring in terms of x, with the data's mean mu; the first interval of the grid is the free move,
    x_s = A x_t + a mu. mu is `mean`, or the `data_mean` of an exact model; for any other the first of the evaluations
    is spent at the start to find it.

    `steps` is the number of network evaluations, exactly. Deterministic, and ends at t_min without a final denoiser.
    Arguments: `scheme`, a tuned one (then `steps` is its own number), or None for the rule; `c`, the data's standard
    deviation (None: the model's `sigma_data`); `mean`, the data's mean, shape of one example (None: see above); `report`,
    what tuning gained; `event_shape`, that of the examples it was tuned on, and `model_sha256`, the digest of the model, None where
    they are not known.
    On a grid that is given it is `Multistep("angle", 3)`: every time but the last costs an evaluation.
    """

    stochastic = False
    default_steps = 10
    denoise_final = False

    def __init__(
        self,
        scheme: Scheme | None = None,
        c: float | None = None,
        mean: Tensor | None = None,
        report: Report | None = None,
        event_shape: tuple[int, ...] | None = None,
        model_sha256: str | None = None,
    ):
        self.scheme = scheme
        self.report = report
        self.c = None if c is None else checks.positive(c, "c")
        self.mean = mean
        if event_shape is None and mean is not None:
            event_shape = tuple(mean.shape)
        self.event_shape = None if event_shape is None else tuple(event_shape)
        if mean is not None and self.event_shape is not None:
            checks.same_shape(mean, self.event_shape, "the mean of a sampler (one example)")
        self.model_sha256 = model_sha256
        if scheme is not None:
            self.default_steps = scheme.nfe

    def scheme_for(
        self,
        model: ScoreModel,
        steps: int,
        t_max: float | None = None,
        event_shape: Sequence[int] | None = None,
    ) -> Scheme:
        """The scheme of a solve with `steps` evaluations on the model's process: of one evaluation less where the first one
        has to find the mean. Raises `ValueError` if a tuned one has another number."""
        if self.scheme is not None:
            if steps != self.scheme.nfe:
                raise ValueError(f"this sampler was tuned for {self.scheme.nfe} evaluations, asked for {steps}.")
            return self.scheme
        ends = torch.tensor([model.sde.t_max if t_max is None else t_max, model.sde.t_min], dtype=torch.float64)
        r_max, r_min = torch.exp(-0.5 * model.sde.log_snr(ends)).tolist()
        c = self.scale(model)
        reach = REACH * data_spread(model, event_shape) * c / model.sigma_data
        between = r_max, max(r_min, 1e-8 * r_max), c, reach
        scheme = untuned(*between, steps)
        at_start = bool(scheme.r[0] >= r_max * (1 - 1e-12))  # the scheme's own first evaluation finds the mean as well
        return scheme if at_start or self.mean_of(model) is not None else untuned(*between, steps - 1)

    def scale(self, model: ScoreModel) -> float:
        return model.sigma_data if self.c is None else self.c

    def mean_of(self, model: ScoreModel) -> Tensor | None:
        """The mean of the data where it is known beforehand: the sampler's own, or that of an exact model.

        A network's flow has a mean of its own, which its denoiser at the start tells; the data's would be another.
        """
        if self.mean is None and model.flow_mismatch < EXACT:
            return model.data_mean
        return self.mean

    def times(
        self,
        model: ScoreModel,
        steps: int,
        t_max: float | None = None,
        event_shape: Sequence[int] | None = None,
    ) -> Tensor:
        sde = model.sde
        start = float(ends_of(sde, steps, t_max)[0])
        inner = sde.time(torch.from_numpy(-2 * np.log(self.scheme_for(model, steps, t_max, event_shape).r[:-1])))
        ends = torch.tensor([start, sde.t_min], dtype=torch.float64)
        if (inner > start + 1e-9).any():
            raise ValueError(
                f"t_max = {start:g} lies below the first evaluation of this tuned sampler, t = {float(inner[0]):g}; leave it out."
            )
        return torch.cat([ends[:1], inner[inner < start - 1e-9], ends[1:]])

    def on_given_grid(self) -> Sampler:
        """Plain Adams in the same coordinates: off the scheme's own noise levels infinity is no useful node."""
        if self.scheme is not None:
            raise ValueError("a tuned sampler runs on its own noise levels; leave out grid.")
        return Multistep("angle" if self.c is None else Angle(self.c), 3)

    def start(self, model: ScoreModel, times: Tensor) -> State[MultistepRow]:
        rows = self.rows(model, times)
        reach = max(1, *(len(row.weights) for row in rows))
        return State(times.tolist(), rows, History(reach, self.mean_of(model)))

    def alone(self, model: ScoreModel, t: float, s: float) -> State[MultistepRow]:
        raise ValueError(
            f"FewStep is a scheme for a whole solve and has no single step from t = {t:g} to {s:g}: begin with "
            'start(model, times), the times being its own times(model, steps), or use Multistep("angle", 3).'
        )

    def evaluations(self, model: ScoreModel, times: Tensor) -> int:
        """How many evaluations a solve through `times`, this sampler's own, takes. Raises `ValueError` for other times."""
        return self._layout(model, times)[0]

    def _layout(self, model: ScoreModel, times: Tensor) -> tuple[int, Sequence[int] | None]:
        """(n, shape): `times` are those of n evaluations for examples of that shape, the model's (None) or one that nobody told.

        One evaluation an interval but for the free move. The rule's first move is free where the start lies nearer to infinity,
        in tau, than one step of the grid.
        """
        for shape in (None, ()):
            n = times.numel() - 1
            if self.scheme is not None:
                n = min(n, self.scheme.nfe)
            elif self.mean_of(model) is not None and n > 1:
                reach = REACH * data_spread(model, shape) * self.scale(model) / model.sigma_data
                start, *following = tau(np.exp(-0.5 * model.sde.log_snr(times[:3]).numpy()), reach)
                n -= bool(1 - start <= following[0] - following[1])
            own = self.times(model, n, float(times[0]), shape)
            if own.shape == times.shape and float((own - times).abs().max()) <= 1e-9:
                return n, shape
        raise ValueError(
            "these are not the times of this sampler: take its times(model, steps), or on_given_grid() for others."
        )

    def rows(self, model: ScoreModel, times: Tensor) -> list[MultistepRow]:
        evaluations, shape = self._layout(model, times)
        scheme = self.scheme_for(model, evaluations, float(times[0]), shape)
        angle, n = Angle(self.scale(model)), scheme.nfe
        points = Points.of(model.sde, times)
        _, size = rotation(points.alpha, points.sigma, angle.c)
        first = times.numel() - 1 - n  # the step that evaluates first for the scheme, after a free move or at once
        at = cast("Points", points[first:-1])
        p, q = angle.combination(affine_arrays(model, times[first:-1]), at)
        keep = size[1:] / size[:-1]
        keep[first:] *= 1 + scheme.gain
        weights = size[first + 1 :, None] * scheme.weights
        finds, shift = self.scheme is None and self.mean_of(model) is None, np.zeros_like(keep)
        if finds or self.mean_of(model) is not None:
            shift = points.alpha[1:] - keep * points.alpha[:-1]
            shift[first:] += weights @ angle.mean_part(at)
        # predictions older than the first that is used need not be remembered
        oldest = [int(np.flatnonzero(w)[0]) if w.any() else i for i, w in enumerate(weights)]
        newest_first = [
            tuple(w[k : i + 1][::-1]) for i, (w, k) in enumerate(zip(weights.tolist(), oldest, strict=True))
        ]
        keep, shift = keep.tolist(), shift.tolist()
        rows = [MultistepRow(0.0, 0.0, keep[0], (), shift=shift[0])] if first else []
        columns = p.tolist(), q.tolist(), keep[first:], newest_first, [0.0] * n, [()] * n, shift[first:]
        rows += [MultistepRow(*row) for row in zip(*columns, strict=True)]
        if finds:
            a, b = angle.centre(affine_arrays(model, times[:1]), cast("Points", points[:1]))
            rows[0] = rows[0]._replace(centre=(float(a[0]), float(b[0])))
        return rows

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        if self.event_shape is not None and tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(
                f"this sampler was tuned for examples of shape {self.event_shape}, got {tuple(x.shape[1:])}; tune one for "
                "this model."
            )
        return super().step(model, x, t, s, state, noise, cond)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, header) that `from_tensors` makes the same sampler of. Raises `ValueError` without a scheme."""
        if self.scheme is None:
            raise ValueError("there is nothing to save: this sampler follows the untuned rule, method='auto'.")
        tensors = {name: torch.from_numpy(getattr(self.scheme, name)) for name in ("r", "gain", "weights")}
        if self.mean is not None:
            tensors["mean"] = self.mean
        return tensors, {
            "c": self.c,
            "report": None if self.report is None else asdict(self.report),
            "event_shape": None if self.event_shape is None else list(self.event_shape),
            "model_sha256": self.model_sha256,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> FewStep:
        """The sampler that `to_tensors` described."""
        scheme = Scheme(*(tensors[name].double().cpu().numpy() for name in ("r", "gain", "weights")))
        report = header["report"]
        if report is not None:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in report.items()}
            report = Report(**values)
        shape, sha256 = header.get("event_shape"), header.get("model_sha256")  # files of old have neither
        return cls(scheme, header["c"], tensors.get("mean"), report, shape, sha256)
