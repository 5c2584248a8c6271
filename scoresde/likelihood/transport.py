r"""A probability-flow solve that carries log densities along, in either direction.

Layer 3. On the angle path (`scoresde.flow`), $du/d\theta = v(u, \theta)$ and x = S u, the instantaneous change of variables
(Chen et al. 2018, theorem 1; Song et al. 2021, equation 39) reads

$$\log p_s(x_s) - \log p_t(x_t) = -\int_{\theta(t)}^{\theta(s)} \mathrm{tr}\frac{\partial v}{\partial u}\,d\theta
  - d\,\log\frac{S(s)}{S(t)} .$$
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import conditions, ode
from scoresde.flow import AnglePath
from scoresde.likelihood.divergence import Divergence
from scoresde.models.base import ScoreModel
from scoresde.samplers.ode import raise_if_failed
from scoresde.sde import expand


@dataclass
class Transport:
    """`x` (B, *) at the end; `change` (B, k), k estimates of log p(end) - log p(start) in nats; `nfe`, `status` (B,)."""

    x: Tensor
    change: Tensor
    nfe: Tensor
    status: Tensor


def transport(
    model: ScoreModel,
    x: Tensor,
    start: float,
    end: float,
    divergence: Divergence,
    probes: Tensor | None,
    *,
    rtol: float,
    atol: float,
    method: str,
    max_nfe: int,
    cond: Any,
) -> Transport:
    """x (B, *) at time `start` to time `end`, with the change of log density, by an adaptive solve of both at once.

    `probes`: random numbers of `divergence`, drawn once for the whole solve. Examples that do not finish carry a status
    of `scoresde.ode`. Raises `NonFiniteError` (naming t and the examples) for NaN from the network.
    """
    start, end = min(start, model.flow_end), min(end, model.flow_end)
    path = AnglePath(model.sde, model.sigma_data)
    ends = (min(start, end), max(start, end))

    def slope(theta: Tensor, u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = conditions.take_rows(cond, rows)
        return divergence(
            lambda leaf: path.velocity(model, leaf, theta, ends, chosen), u, None if probes is None else probes[rows]
        )

    solution = ode.solve(
        slope,
        x / expand(path.scale(start), x),
        float(path.angle(start)),
        float(path.angle(end)),
        rtol=rtol,
        atol=atol,
        q_tol=10 * (rtol + atol),
        method=method,
        max_nfe=max_nfe,
    )
    if bool((solution.status == ode.NOT_FINITE).any()):
        raise_if_failed(solution, path, ends)
    d = math.prod(x.shape[1:])
    stretch = d * math.log(float(path.scale(end)) / float(path.scale(start)))
    q = solution.q if solution.q.shape[1] else torch.zeros(x.shape[0], 1, dtype=torch.float64, device=x.device)
    return Transport(solution.y * expand(path.scale(end), x), -q - stretch, solution.nfe, solution.status)
