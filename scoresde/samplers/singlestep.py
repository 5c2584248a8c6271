"""Singlestep exponential Runge-Kutta methods: DPM-Solver-2, -3 and DPM-Solver++ (2S). Layer 3."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import Grid, balanced
from scoresde.models.base import ScoreModel
from scoresde.models.prepared import combine
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State, add_times
from scoresde.samplers.exponential import Points, Prediction, affine_arrays, prediction_for, step_weights

SINGLESTEP_GRID = partial(balanced, rho=3.0)


class Stage(NamedTuple):
    """Evaluate at `time`, with m = p x + q F, then go from the step's start: keep x + sum of weights[j] m_j."""

    time: float
    p: float
    q: float
    keep: float
    weights: tuple[tuple[int, float], ...]


# fractions of the step in log-SNR at which stages stand, and which predictions each stage (and the end) is made from
SCHEMES: dict[str, tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]] = {
    "midpoint": ((0.5,), ((0,), (1,))),
    "third": ((1 / 3, 2 / 3), ((0,), (0, 1), (0, 2))),
}


class SinglestepRow(NamedTuple):
    """One step: its stages, the first at the step's start; what the last one makes is the step's end."""

    stages: tuple[Stage, ...]


class Singlestep(Sampler[SinglestepRow]):
    r"""Stages inside a step, each by exact integration of the polynomial in log-SNR through earlier stages:

    $$x_{i+1} = A_i\,x_t + \sum_{j \le i} w_{ij}\,m(x_j, t_j), \qquad w_{ij} = G_i\int_t^{t_{i+1}} \ell_j\,dM, \qquad x_0 = x_t,$$

    the last of which is x_s; m, M, A and G are the prediction's (`scoresde.samplers.exponential`).

    Arguments: `prediction`, "noise", "data" or "angle"; `scheme`, "midpoint" (order 2, two evaluations: DPM-Solver-2 of Lu
    et al. 2022a, algorithm 1, with noise prediction; DPM-Solver++ (2S) of Lu et al. 2022b with data prediction) or
    "third" (order 3, three evaluations: DPM-Solver-3, their algorithm 2 with r_1 = 1/3, r_2 = 2/3). A step that ends at
    sigma = 0 has no middle in log-SNR and is taken by Euler.
    """

    stochastic = False
    row_type = SinglestepRow
    default_steps = 10
    denoise_final = False

    def __init__(
        self, prediction: str | Prediction = "noise", scheme: str = "midpoint", *, grid: Grid = SINGLESTEP_GRID
    ):
        kind = prediction_for(prediction, 1.0)
        if kind.noisy:
            raise ValueError("singlestep methods are deterministic; for a noisy phi use Multistep(Data(phi), order).")
        self.prediction = prediction
        self.scheme = checks.choice(scheme, SCHEMES, "singlestep scheme")
        self.fractions, self.nodes = SCHEMES[scheme]
        self.nfe_per_step = self.convergence_order = 1 + len(self.fractions)
        self.saved_at_zero = len(self.fractions)
        self.grid = grid

    def rows(self, model: ScoreModel, times: Tensor) -> list[SinglestepRow]:
        t, s = times[:-1], times[1:]
        sde, prediction = model.sde, prediction_for(self.prediction, model.sigma_data)
        start, end = (-0.5 * sde.log_snr(v) for v in (t, s))
        at = [Points.of(sde, sde.time(-2 * (start + c * (end - start))) if c else t) for c in (0.0, *self.fractions)]
        last = Points.of(sde, s)
        columns = []
        for here, target, nodes in zip(at, [*at[1:], last], self.nodes, strict=True):
            weights = step_weights(prediction, sde, at[0], target, [at[j] for j in nodes])
            pair = prediction.combination(affine_arrays(model, torch.from_numpy(here.t)), here)
            rows = np.stack([here.t, *pair, prediction.ends(at[0], target)[0], *weights], 1).tolist()
            columns.append([Stage(time, p, q, a, tuple(zip(nodes, w, strict=True))) for time, p, q, a, *w in rows])
        steps = list(zip(*columns, strict=True))
        keep, gain, total, _ = prediction.ends(at[0], last)
        for i in np.flatnonzero(last.sigma == 0):
            steps[i] = (steps[i][0]._replace(keep=float(keep[i]), weights=((0, float(gain[i] * total[i])),)),)
        add_times(model, torch.tensor([stage.time for stages in steps for stage in stages[1:]], dtype=torch.float64))
        return list(map(SinglestepRow, steps))

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        predictions: list[Tensor] = []
        at = x
        for stage in self.row(model, state, t, s).stages:
            predictions.append(combine(stage.p, at, stage.q, model.output(at, stage.time, cond)))
            at = torch.mul(x, stage.keep)
            for j, w in stage.weights:
                at.add_(predictions[j], alpha=w)
        return at
