r"""Log density by the probability-flow ODE.

Layer 3. On the angle path (`scoresde.flow`), $du/d\theta = v(u, \theta)$, the instantaneous change of variables
(Chen et al. 2018, theorem 1; Song et al. 2021, equation 39) reads

$$\log p(x_{t_{min}}) = \log \pi(x_1) + \int_{\theta(t_{min})}^{\theta(1)} \mathrm{tr}\frac{\partial v}{\partial u}\,d\theta
  + d\,\log\frac{r(1)}{r(t_{min})},$$

with r the scale of x = r u and $\pi$ the model's density at t = 1: the SDE's prior for a network, the closed form for an
exact mixture. The result is the density of the model's own marginal at t_min.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import ode
from scoresde.flow import AnglePath, take_rows
from scoresde.likelihood.divergence import Divergence, Exact, Hutchinson
from scoresde.model import ScoreModel, check_input
from scoresde.modes import evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.samplers.ode import raise_if_failed
from scoresde.sde import expand

EXACT_UP_TO = 32  # entries of an example up to which the exact trace is the default


@dataclass
class LogProb:
    """Log densities of a batch.

    `value` (B,) nats, float64, NaN where an example did not finish; `stderr` (B,) nats, the standard error from the
    trace estimate alone (0 for an exact trace, NaN for a single probe); `latent` (B, *), the example at t = 1; `nfe`
    (B,) evaluations of the network; `status` (B,), 0 where the solve finished (`scoresde.ode.STATUS_TEXT`).
    """

    value: Tensor
    stderr: Tensor
    latent: Tensor
    nfe: Tensor
    status: Tensor


def default_divergence(d: int) -> Divergence:
    """`Exact()` up to 32 dimensions, four Rademacher probes beyond."""
    return Exact() if d <= EXACT_UP_TO else Hutchinson(4)


def log_prob(
    model: ScoreModel,
    x: Tensor,
    *,
    divergence: Divergence | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "tsit5",
    max_nfe: int = 10_000,
    seed: Seed = None,
    cond: Any = None,
) -> LogProb:
    """Log density of the model at x (B, *), in nats, by the probability-flow ODE.

    `divergence`: how the trace is taken, `default_divergence` unless given; `rtol`, `atol`: error per step; `method`:
    "tsit5", "dopri5" or "bosh3"; `max_nfe`: evaluations per example before it stops with a status; `seed`: of the
    probes, one int or one per example. Raises `ValueError` for NaN in x or a wrong shape, `TypeError` for integer x,
    `NonFiniteError` (naming t and the examples) for NaN from the network.
    """
    check_input(model, x, cond)
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # the state of a solve is float32 at least
    d = math.prod(x.shape[1:])
    divergence = default_divergence(d) if divergence is None else divergence
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be Exact(), Hutchinson(...) or another Divergence, got {divergence!r}.")
    sde, path = model.sde, AnglePath(model.sde, model.sigma_data)
    ends = (sde.t_min, model.flow_end)
    probes = divergence.probes(x.shape, x.dtype, RandomSource(seed, x.device, x.shape[0], salt=1))

    def slope(theta: Tensor, u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = take_rows(cond, rows)
        return divergence(
            lambda leaf: path.velocity(model, leaf, theta, ends, chosen), u, None if probes is None else probes[rows]
        )

    with evaluating(model):
        solution = ode.solve(
            slope,
            x / expand(path.scale(sde.t_min), x),
            float(path.angle(sde.t_min)),
            float(path.angle(ends[1])),
            rtol=rtol,
            atol=atol,
            q_tol=10 * (rtol + atol),
            method=method,
            max_nfe=max_nfe,
        )
    if bool((solution.status == ode.NOT_FINITE).any()):
        raise_if_failed(solution, path, ends)
    latent = solution.y * expand(path.scale(ends[1]), x)
    q = solution.q if solution.q.shape[1] else torch.zeros(x.shape[0], 1, dtype=torch.float64, device=x.device)
    rescale = d * math.log(float(path.scale(ends[1])) / float(path.scale(sde.t_min)))
    value = model.terminal_log_prob(latent) + q.mean(1) + rescale
    value = torch.where(solution.status == ode.OK, value, torch.nan)
    if isinstance(divergence, Exact):
        stderr = torch.zeros_like(value)
    else:
        stderr = q.std(1) / math.sqrt(q.shape[1]) if q.shape[1] > 1 else torch.full_like(value, torch.nan)
    stderr = torch.where(solution.status == ode.OK, stderr, torch.nan)
    return LogProb(value, stderr, latent, solution.nfe, solution.status)
