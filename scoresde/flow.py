r"""The probability-flow ODE in coordinates where it is mild, and its adaptive solve.

Layer 2. With the data's scale c = sigma_data and centre mu, put $\theta = \mathrm{atan2}(\sigma, \alpha c)$,
$S = \sqrt{\alpha^2 c^2 + \sigma^2}$ and $u = (x - \alpha\mu) / S = \cos\theta\,(x_0 - \mu)/c + \sin\theta\,\epsilon$. Along
the probability flow

$$\frac{du}{d\theta} = \cos\theta\,\hat\epsilon(x, t) - \sin\theta\,(D(x, t) - \mu)/c,$$

for every affine SDE: no drift, no diffusion coefficient, and nothing that grows at either end. It is the change of
variables x = alpha y, dy = eps_hat d(sigma/alpha) (Song et al. 2021, equation 13; Karras et al. 2022, equation 1),
rotated so that the state keeps unit variance: the angle path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from scoresde import checks, conditions, ode
from scoresde.models.base import ScoreModel
from scoresde.numerics import Array
from scoresde.sde import SDE, expand

Numbers = TypeVar("Numbers", Tensor, Array)  # the coordinates are the same for both
Velocity: TypeAlias = "Callable[[Tensor], Tensor]"
# (the velocity as a function of u, u (A, *), rows (A,)) -> (du/dtheta (A, *), its divergence (A, k))
Trace: TypeAlias = "Callable[[Velocity, Tensor, Tensor], tuple[Tensor, Tensor]]"


def rotation(alpha: Numbers | float, sigma: Numbers, c: float) -> tuple[Numbers, Numbers]:
    """(theta, S) of the angle path where the schedule is (alpha, sigma), for tensors or arrays; (1, r) for r = sigma/alpha."""
    lib: Any = torch if isinstance(sigma, Tensor) else np
    return lib.arctan2(sigma, alpha * c), lib.hypot(sigma, alpha * c)


def rotated_velocity(cosine: Any, sine_over_c: Any, denoised: Any, noise: Any) -> Any:
    """du/dtheta = cos(theta) eps_hat - sin(theta) D / c of numbers, arrays or tensors.

    It is linear in (D, eps_hat), so it takes the coefficients that these have in x, or in a network's output, as well.
    """
    return cosine * noise - sine_over_c * denoised


class AnglePath:
    """Maps between (x, t) and (u, theta) for one SDE, data scale and centre (one example, or one of each; None for zero).

    Times and angles are float64.
    """

    def __init__(self, sde: SDE, sigma_data: float = 1.0, centre: Tensor | None = None):
        self.sde = sde
        self.c = sigma_data
        self.centre = centre

    def angle(self, t: Tensor | float) -> Tensor:
        """theta(t) in (0, pi/2], increasing in t."""
        return rotation(self.sde.alpha(t), self.sde.sigma(t), self.c)[0]

    def scale(self, t: Tensor | float) -> Tensor:
        """S = sqrt(alpha^2 c^2 + sigma^2)."""
        return rotation(self.sde.alpha(t), self.sde.sigma(t), self.c)[1]

    def rotated(self, x: Tensor, t: Tensor | float) -> Tensor:
        """u = (x - alpha mu) / S."""
        return (x if self.centre is None else x - expand(self.sde.alpha(t), x) * self.centre) / expand(self.scale(t), x)

    def unrotated(self, u: Tensor, t: Tensor | float, rows: Tensor | None = None) -> Tensor:
        """x = S u + alpha mu; `rows`: which examples u (A, *) holds, where they are not all."""
        x = expand(self.scale(t), u) * u
        if self.centre is None:
            return x
        return torch.addcmul(x, expand(self.sde.alpha(t), u), self.centre_of(rows, u))

    def centre_of(self, rows: Tensor | None, like: Tensor) -> Tensor:
        """mu of the examples `rows`, to be combined with `like` (A, *)."""
        centre = cast(Tensor, self.centre)  # asked for only where there is one
        each = rows is not None and centre.dim() == like.dim()
        return (centre[rows] if each else centre).to(like)

    def time(self, theta: Tensor, low: float, high: float) -> Tensor:
        """t(theta), kept within [low, high], the ends of the solve, which rounding could otherwise leave."""
        return self.sde.time(-2 * torch.log(torch.tan(theta) * self.c)).clamp(low, high)

    def velocity(
        self,
        model: ScoreModel,
        u: Tensor,
        theta: Tensor,
        ends: tuple[float, float],
        cond: Any = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """du/dtheta for u (B, *) and theta (B,), of the examples `rows` where they are not all; one evaluation of the model."""
        t = self.time(theta, *ends)
        denoised, noise = model.predict(self.unrotated(u, t, rows), t, cond)
        if self.centre is not None:
            denoised = denoised - self.centre_of(rows, u)
        cosine, sine_over_c = expand(torch.cos(theta), u), expand(torch.sin(theta) / self.c, u)
        return rotated_velocity(cosine, sine_over_c, denoised, noise)


@dataclass
class FlowSolution:
    """Where each example ended: `x` (B, *); `divergence` (B, k), the trace's integrals over theta, (B, 0) without one; `t` (B,),
    the time reached; `nfe` and `status` (B,) integers (`scoresde.ode.STATUS_TEXT`).
    """

    x: Tensor
    divergence: Tensor
    t: Tensor
    nfe: Tensor
    status: Tensor

    def raise_if_failed(self) -> None:
        """An error naming the first kind of failure, the samples it met and the t they stopped at."""
        if not bool((self.status != ode.OK).any()):
            return
        worst = int(self.status.max())
        rows = (self.status == worst).nonzero().flatten().tolist()
        text = (
            f"the ODE solve failed in {len(rows)} of {self.status.numel()} samples, rows {checks.rows_text(rows)}: "
            f"{ode.STATUS_TEXT[worst]}; row {rows[0]} stopped at the step from t = {float(self.t[rows[0]]):.6g}, "
            f"after {int(self.nfe[rows[0]])} evaluations."
        )
        if worst == ode.NOT_FINITE:
            raise checks.NonFiniteError(text + " Check the network's output at that t.")
        raise RuntimeError(text + " Raise max_nfe or loosen rtol and atol.")


def solve_flow(
    model: ScoreModel,
    x: Tensor,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    method: str = "tsit5",
    max_nfe: int = 10_000,
    cond: Any = None,
    trace: Trace | None = None,
) -> FlowSolution:
    """The probability flow from x (B, *) at time `start` to `end`, in either direction, each example with steps of its own.

    `rtol`, `atol`: error per step relative to a state of unit scale; `method`: a pair of `scoresde.ode`; `max_nfe`: evaluations
    per example; `trace`: how the divergence of du/dtheta is taken where it is to be integrated along. The centre of the coordinates
    is the model's `data_mean`; where it is not known and the solve comes from the noise, one evaluation at its start finds it.
    Nothing is raised for examples that fail: they carry a status.
    """
    rtol, atol = checks.positive(rtol, "rtol"), checks.positive(atol, "atol")
    start, end = min(start, model.flow_end), min(end, model.flow_end)
    ends = (min(start, end), max(start, end))
    centre, found = model.data_mean, 0
    if centre is None and end < start and x.shape[0]:
        centre, found = torch.nan_to_num(model.denoise(x, start, cond).detach(), 0.0, 0.0, 0.0), 1
    path = AnglePath(model.sde, model.sigma_data, None if centre is None else centre.to(x))

    def slope(theta: Tensor, u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        chosen = conditions.take_rows(cond, rows)
        if trace is None:
            return path.velocity(model, u, theta, ends, chosen, rows), None
        return trace(lambda leaf: path.velocity(model, leaf, theta, ends, chosen, rows), u, rows)

    solution = ode.solve(
        slope,
        path.rotated(x, start),
        float(path.angle(start)),
        float(path.angle(end)),
        rtol=rtol,
        atol=atol,
        q_tol=10 * (rtol + atol),
        method=method,
        max_nfe=max_nfe,
    )
    reached = path.time(solution.t, *ends)
    return FlowSolution(path.unrotated(solution.y, end), solution.q, reached, solution.nfe + found, solution.status)
