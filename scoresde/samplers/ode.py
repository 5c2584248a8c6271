"""Adaptive solution of the probability-flow ODE. Layer 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scoresde import checks, conditions, ode
from scoresde.flow import AnglePath
from scoresde.grids import uniform_time
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State
from scoresde.sde import SDE, expand


def whole_path(sde: SDE, steps: int, *, t_max: float | None = None) -> Tensor:
    """Uniform times from t = 1 itself, where the probability flow is finite for every SDE, to t_min."""
    if t_max is not None:
        return uniform_time(sde, steps, t_max=t_max)
    return torch.linspace(1.0, sde.t_min, steps + 1, dtype=torch.float64)


class ProbabilityFlow(Sampler):
    """Embedded Runge-Kutta on the angle path (`scoresde.flow`), each sample with steps of its own.

    Arguments: `rtol`, `atol`: error per step relative to a state of unit scale; `method`: "tsit5", "dopri5" or
    "bosh3"; `max_nfe`: evaluations per sample and interval of the grid. A grid of one interval is the default:
    `steps` only says at how many times a trajectory is recorded. Deterministic: it ends at t_min, without a final
    denoiser, so that `encode` inverts it. `nfe` holds the mean number of evaluations per sample of the last solve.

    Raises `NonFiniteError` if the network returns NaN, `RuntimeError` if a sample does not reach the end.
    """

    default_steps = 1
    nfe_per_step = None
    denoise_final = False
    grid = staticmethod(whole_path)

    def __init__(self, rtol: float = 1e-4, atol: float = 1e-4, method: str = "tsit5", max_nfe: int = 10_000):
        self.rtol = checks.positive(rtol, "rtol")
        self.atol = checks.positive(atol, "atol")
        self.method = checks.choice(method, ode.TABLEAUX, "Runge-Kutta method")
        self.max_nfe = checks.positive_int(max_nfe, "max_nfe")
        self.nfe = 0.0

    def start(self, model: ScoreModel, times: Tensor) -> State:
        self.nfe = 0.0
        return super().start(model, times)

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        if x.shape[0] == 0:
            return x
        t, s = min(t, model.flow_end), min(s, model.flow_end)
        path = AnglePath(model.sde, model.sigma_data)
        ends = (min(s, t), max(s, t))

        def slope(theta: Tensor, u: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            return path.velocity(model, u, theta, ends, conditions.take_rows(cond, rows)), None

        solution = ode.solve(
            slope,
            x / expand(path.scale(t), x),
            float(path.angle(t)),
            float(path.angle(s)),
            rtol=self.rtol,
            atol=self.atol,
            method=self.method,
            max_nfe=self.max_nfe,
        )
        self.nfe += float(solution.nfe.double().mean())
        raise_if_failed(solution, path, ends)
        return solution.y * expand(path.scale(s), x)


def raise_if_failed(solution: ode.Solution, path: AnglePath, ends: tuple[float, float]) -> None:
    """An error naming the first kind of failure, the samples it met and the t they stopped at."""
    if not bool((solution.status != ode.OK).any()):
        return
    worst = int(solution.status.max())
    rows = (solution.status == worst).nonzero().flatten().tolist()
    t = float(path.time(solution.t[rows[0]], *ends))
    text = (
        f"the ODE solve failed in {len(rows)} of {solution.status.numel()} samples, rows {checks.rows_text(rows)}: "
        f"{ode.STATUS_TEXT[worst]}; row {rows[0]} stopped at the step from t = {t:.6g}, "
        f"after {int(solution.nfe[rows[0]])} evaluations."
    )
    if worst == ode.NOT_FINITE:
        raise checks.NonFiniteError(text + " Check the network's output at that t.")
    raise RuntimeError(text + " Raise max_nfe or loosen rtol and atol.")
