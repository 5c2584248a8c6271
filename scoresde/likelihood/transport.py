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

from scoresde import ode
from scoresde.flow import AnglePath, solve_flow
from scoresde.likelihood.divergence import Divergence
from scoresde.models.base import ScoreModel


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
    moved = solve_flow(
        model,
        x,
        start,
        end,
        rtol=rtol,
        atol=atol,
        method=method,
        max_nfe=max_nfe,
        cond=cond,
        trace=lambda velocity, u, rows: divergence(velocity, u, None if probes is None else probes[rows]),
    )
    if bool((moved.status == ode.NOT_FINITE).any()):
        moved.raise_if_failed()
    path = AnglePath(model.sde, model.sigma_data)
    stretch = math.prod(x.shape[1:]) * math.log(float(path.scale(end)) / float(path.scale(start)))
    q = moved.divergence
    if not q.shape[1]:  # an empty batch, or a solve of no length
        q = torch.zeros(x.shape[0], 1, dtype=torch.float64, device=x.device)
    return Transport(moved.x, -q - stretch, moved.nfe, moved.status)
