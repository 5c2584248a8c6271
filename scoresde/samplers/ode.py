"""Adaptive solution of the probability-flow ODE. Layer 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scoresde import checks, ode
from scoresde.flow import solve_flow
from scoresde.grids import uniform_time
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State
from scoresde.sde import SDE


def whole_path(sde: SDE, steps: int, *, t_max: float | None = None) -> Tensor:
    """Uniform times from t = 1 itself, where the probability flow is finite for every SDE, to t_min."""
    if t_max is not None:
        return uniform_time(sde, steps, t_max=t_max)
    return torch.linspace(1.0, sde.t_min, steps + 1, dtype=torch.float64)


class ProbabilityFlow(Sampler):
    r"""The probability flow by an embedded Runge-Kutta pair on the angle path, each sample with steps of its own:

    $$\frac{du}{d\theta} = \cos\theta\,\hat\epsilon - \sin\theta\,D/c, \qquad
      x = S u, \quad \theta = \arctan\frac{\sigma}{\alpha c}, \quad S = \sqrt{\alpha^2 c^2 + \sigma^2},$$

    with the data's scale c (`scoresde.flow.solve_flow`).
    Arguments: `rtol`, `atol`: error per step relative to a state of unit scale; `method`: "tsit5", "dopri5" or
    "bosh3"; `max_nfe`: evaluations per sample and interval of the grid. A grid of one interval is the default:
    `steps` only says at how many times a trajectory is recorded. Deterministic: it ends at t_min, without a final
    denoiser, so that `encode` inverts it. `nfe` holds the mean number of evaluations per sample of the last solve.

    Raises `NonFiniteError` if the network returns NaN, `RuntimeError` if a sample does not reach the end.
    """

    stochastic = False
    adaptive = True
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

    @property
    def solve_options(self) -> dict[str, Any]:  # type: ignore[override]  # never set: it follows rtol and the others
        return dict(rtol=self.rtol, atol=self.atol, method=self.method, max_nfe=self.max_nfe)

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        if x.shape[0] == 0:
            return x
        solution = solve_flow(model, x, t, s, cond=cond, **self.solve_options)
        self.nfe += float(solution.nfe.double().mean())
        solution.raise_if_failed()
        return solution.x
