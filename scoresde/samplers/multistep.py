"""Multistep samplers: one class for the exponential integrators of the literature, deterministic and stochastic.

Layer 3. A step evaluates the model once and reuses the latest predictions; `scoresde.samplers.exponential` gives the
weights. The table of known methods, each a choice of the arguments:

| method | prediction | variable | order | corrector | pair |
|---|---|---|---|---|---|
| DDIM | noise or data | any | 1 | | |
| DPM-Solver++ (2M), Lu et al. 2022b | data | log-SNR | 2 | | midpoint |
| DPM-Solver++ (3M) | data | log-SNR | 3 | | exact |
| UniPC-p, Zhao et al. 2023 (B_2) | data | log-SNR | p | p + 1 | midpoint |
| DEIS tAB-k, Zhang & Chen 2023 | noise | time | k + 1 | | exact |
| linear multistep (LMS), Karras et al.'s sigma | noise | ratio | k | | exact |
| iPNDM, Zhang & Chen 2023 | noise | index | 4 | | |
| exponential Adams-Bashforth | noise, data, angle | log-SNR | k | | exact |
| SDE-DPM-Solver++ (2M), (3M) | data, tau = 1 | log-SNR | 2, 3 | | midpoint, exact |
| SA-Solver, Xue et al. 2023 | data, tau in a window | log-SNR | p | c | exact |
| ER-SDE-1, -2, Cui et al. 2023 | data, their phi | ratio | 1, 2 | | exact |

With three predictions the ER-SDE here takes the exact integral of the quadratic, where the paper takes a Taylor term; and from
order 3 on the first step of every method is redone, which no paper does (see `Multistep`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import Grid, balanced
from scoresde.models.base import ScoreModel
from scoresde.models.prepared import combine
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State, undefined
from scoresde.samplers.exponential import (
    VARIABLES,
    Array,
    Points,
    Prediction,
    affine_arrays,
    prediction_for,
    step_weights,
)
from scoresde.sde import SDE

# classical Adams-Bashforth weights, newest first: what iPNDM uses on any grid
_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class MultistepRow(NamedTuple):
    """One step: evaluate m_0 = p x + q F, then go on to keep x + sum_j weights[j] m_j + noise z + shift mu.

    The predictions m_j are counted from the newest, m_0. `corrector`, if any, are weights by which the step before is redone
    first, once m_0 is known, with `corrector_shift` in place of its shift. mu is the centre of the data; where it is not known
    beforehand, `centre` (a, b) finds it from this step's evaluation, mu = a x + b F. Without `weights` and `centre` nothing is
    evaluated.
    """

    p: float
    q: float
    keep: float
    weights: tuple[float, ...]
    noise: float = 0.0
    corrector: tuple[float, ...] = ()
    shift: float = 0.0
    corrector_shift: float = 0.0
    centre: tuple[float, ...] = ()


@dataclass
class History:
    """What a multistep solve remembers: the last predictions, newest first, and keep x + noise z of the last step.

    `reach`: predictions that a step uses, its own included; older ones are let go. `centre`: mu of `MultistepRow`, of one example
    or of each.
    """

    reach: int
    centre: Tensor | None = None
    predictions: list[Tensor] = field(default_factory=list)
    base: Tensor | None = None

    def shifted(self, x: Tensor, shift: float) -> Tensor:
        """x + shift mu; x itself for no shift."""
        if not shift:
            return x
        self.centre = cast("Tensor", self.centre).to(x)  # rows with a shift have one
        return torch.add(x, self.centre, alpha=shift)


class HistorySampler(Sampler[MultistepRow]):
    """The step of every method that reuses its latest predictions. A subclass gives `rows` and `reach`, or `start`."""

    row_type = MultistepRow
    reach: int

    def start(self, model: ScoreModel, times: Tensor) -> State[MultistepRow]:
        return State(times.tolist(), self.rows(model, times), History(self.reach, model.data_mean))

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        row = self.row(model, state, t, s)
        history: History = state.memory
        predictions = history.predictions
        if row.weights or row.centre:
            out = model.output(x, t, cond)
            if row.centre:
                history.centre = combine(row.centre[0], x, row.centre[1], out)
        if row.weights:
            predictions.insert(0, combine(row.p, x, row.q, out))
            if len(predictions) < max(len(row.weights), len(row.corrector)):
                raise ValueError(
                    f"this step of {type(self).__name__}, from t = {t:g}, reuses predictions of the steps before it; start a solve "
                    "there with start(model, times)."
                )
        if row.corrector:
            x = history.shifted(cast("Tensor", history.base), row.corrector_shift)
            for w, m in zip(row.corrector, predictions, strict=False):
                x = torch.add(x, m, alpha=w)
        base = torch.mul(x, row.keep)
        if row.noise:
            base.add_(noise.normal(x.shape, x.dtype), alpha=row.noise)
        history.base = base
        x = history.shifted(base, row.shift)
        for j, w in enumerate(row.weights):
            x = torch.add(x, predictions[j], alpha=w) if j == 0 else x.add_(predictions[j], alpha=w)
        del predictions[history.reach - 1 :]
        return x


class Multistep(HistorySampler):
    r"""The polynomial through the predictions m_j of the last `order` steps, integrated exactly:

    $$x_s = A\,x_t + \sum_j w_j\,m_j + C\,z, \qquad w_j = G\int_t^s \ell_j\,dM,$$

    with A, G, C and M of the prediction (`scoresde.samplers.exponential`).

    Arguments:
        prediction: "noise", "data", "angle", or an object of `scoresde.samplers.exponential` (`Data(phi)` with noise).
        order: predictions that a step uses; the first steps use those that there are.
        variable: what the interpolating polynomial is a polynomial in: "log-snr", "ratio" (sigma/alpha), "time",
            "angle", or "index" (equal steps assumed, as iPNDM does).
        corrector: nodes of an implicit formula by which a step is redone once the model was evaluated at its end
            (UniC: no further evaluation); 0 for none.
        pair: "exact", or "midpoint" for the published two-node formulas (`step_weights`).
        grid, default_steps: as for every sampler.

    Order of convergence (deterministic, smooth grids): that of the predictor, one more with a corrector of one more node,
    2 for "index"; at most 3. From order 3 on the first step is redone with the corrector of two nodes: otherwise it
    alone, of first order, would hold the whole solve at order 2.
    """

    default_steps = 20
    denoise_final = False

    def __init__(
        self,
        prediction: str | Prediction = "noise",
        order: int = 3,
        *,
        variable: str = "log-snr",
        corrector: int = 0,
        pair: str = "exact",
        grid: Grid = balanced,
        default_steps: int = 20,
    ):
        self.prediction = prediction
        self.order = checks.positive_int(order, "order")
        self.variable = checks.choice(variable, (*VARIABLES, "index"), "interpolation variable")
        if self.order > 4:
            raise ValueError(f"order must lie in 1..4, got {order}: extrapolation through more nodes is unstable.")
        if isinstance(corrector, bool) or not isinstance(corrector, int) or not 0 <= corrector <= self.order + 1:
            raise ValueError(
                f"corrector must be a number of nodes from 0 to order + 1 = {self.order + 1}, got {corrector!r}."
            )
        if variable == "index" and corrector:
            raise ValueError("variable='index' has no corrector; choose another variable.")
        self.corrector = corrector
        self.midpoint = checks.choice(pair, ("exact", "midpoint"), "pair") == "midpoint"
        kind = prediction_for(prediction, 1.0)  # a wrong name is an error here, not at the first use
        self.stochastic = kind.noisy
        self.reach = max(self.order, self.corrector)
        highest = 2 if variable == "index" else 3
        self.convergence_order = None if self.stochastic else min(highest, self.reach)
        self.grid = grid
        self.default_steps = default_steps

    def rows(self, model: ScoreModel, times: Tensor) -> list[MultistepRow]:
        points = Points.of(model.sde, times)
        prediction = prediction_for(self.prediction, model.sigma_data)
        pairs = prediction.combination(affine_arrays(model, times), points)
        steps = times.numel() - 1
        bounds = [
            *range(min(self.order + 1, steps)),
            steps,
        ]  # the first steps have fewer nodes each, the rest are alike
        rows: list[MultistepRow] = []
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is named below
            for first, last in itertools.pairwise(bounds):
                rows += self._group(model.sde, prediction, points, pairs, first, last)
        if prediction.centred and model.data_mean is None:
            a, b = prediction.centre(affine_arrays(model, times[:1]), cast("Points", points[:1]))
            rows[0] = rows[0]._replace(centre=(float(a[0]), float(b[0])))
        return rows

    def _group(
        self, sde: SDE, prediction: Prediction, points: Points, pairs: tuple[Array, Array], first: int, last: int
    ) -> list[MultistepRow]:
        """Rows of the steps first..last-1, all with the number of nodes that step `first` has."""

        def back(k: int) -> Points:
            return cast("Points", points[first - k : last - k])

        t, s = back(0), back(-1)
        count = min(first + 1, self.order)
        keep, gain, total, noise = prediction.ends(t, s)
        if self.variable == "index":
            weights = np.outer(_ADAMS[count - 1], gain * total)
        else:
            nodes = [back(k) for k in range(count)]
            weights = step_weights(prediction, sde, t, s, nodes, self.variable, midpoint=self.midpoint and count == 2)
        redo = self._corrector_nodes(first)
        corrector = np.empty((0, last - first))
        if redo:
            nodes = [back(k) for k in range(redo)]
            corrector = step_weights(
                prediction, sde, back(1), t, nodes, self.variable, midpoint=self.midpoint and redo == 2
            )
        shift = corrector_shift = np.zeros_like(keep)
        if prediction.centred:  # what the mean of the data has to move by for the solve not to notice it
            parts = [prediction.mean_part(back(k)) for k in range(max(count, redo))]
            shift = s.alpha - keep * t.alpha + sum(w * part for w, part in zip(weights, parts, strict=False))
            if redo:
                before = back(1).alpha * prediction.ends(back(1), t)[0]
                corrector_shift = t.alpha - before + sum(w * part for w, part in zip(corrector, parts, strict=False))
        numbers = np.stack(
            [*(v[first:last] for v in pairs), keep, noise, shift, corrector_shift, *weights, *corrector], 1
        )
        for i in np.flatnonzero(~np.isfinite(numbers).all(1))[:1]:
            raise undefined(self, sde, float(t.t[i]), float(s.t[i]))
        return [
            MultistepRow(p, q, keep, tuple(rest[:count]), noise, tuple(rest[count:]), shift, corrector_shift)
            for p, q, keep, noise, shift, corrector_shift, *rest in numbers.tolist()
        ]

    def _corrector_nodes(self, step: int) -> int:
        """Nodes with which the step before `step` is redone: 0 for not at all."""
        if step == 0 or self.variable == "index":
            return 0
        used = min(step, self.order)  # nodes of the predictor of that step
        if self.corrector:
            return min(self.corrector, used + 1)
        return 2 if step == 1 and self.order >= 3 else 0
