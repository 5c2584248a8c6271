r"""Log density by the probability-flow ODE.

Layer 3. $\log p(x_{t_{min}}) = \log\pi(x_1) + $ the change along the flow (`scoresde.likelihood.transport`), with $\pi$ the
model's density at t = 1: the SDE's prior for a network, the closed form for an exact mixture. The result is the density of
the model's own marginal at t_min.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde import ode
from scoresde.likelihood.dequantization import warn_if_quantized
from scoresde.likelihood.divergence import Divergence, Exact, Hutchinson
from scoresde.likelihood.transport import Transport, transport
from scoresde.model import ScoreModel, check_input
from scoresde.modes import evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.sde import sum_event

PROBES = 1  # the salt of the probes' seed: they must not repeat the noise that a sample was drawn from
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
    warn_if_quantized(x, "log_prob")
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # the state of a solve is float32 at least
    d = math.prod(x.shape[1:])
    divergence = default_divergence(d) if divergence is None else divergence
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be Exact(), Hutchinson(...) or another Divergence, got {divergence!r}.")
    probes = divergence.probes(x.shape, x.dtype, RandomSource(seed, x.device, x.shape[0], salt=PROBES))
    with evaluating(model):
        moved = transport(
            model,
            x,
            model.sde.t_min,
            1.0,
            divergence,
            probes,
            rtol=rtol,
            atol=atol,
            method=method,
            max_nfe=max_nfe,
            cond=cond,
        )
    return from_transport(model.terminal_log_prob(moved.x), -moved.change, moved, moved.x, divergence)


def generate(
    model: ScoreModel,
    z: Tensor,
    times: Sequence[float],
    *,
    divergence: Divergence | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "tsit5",
    max_nfe: int = 10_000,
    seed: Seed = None,
    cond: Any = None,
    trajectory: Callable[[float, Tensor], None] | None = None,
    base_std: float | None = None,
) -> tuple[Tensor, LogProb]:
    """Latents z (B, *) at times[0] to samples at times[-1] with their log densities, from one solve.

    `times`: decreasing, to t_min; the states there go to `trajectory`. `base_std`: z was drawn from N(0, base_std^2 I) at
    times[0]; None where times[0] is the prior's end, whose density the model knows. The rest is as for `log_prob`.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    divergence = default_divergence(math.prod(z.shape[1:])) if divergence is None else divergence
    probes = divergence.probes(z.shape, z.dtype, RandomSource(seed, z.device, z.shape[0], salt=PROBES))
    if base_std is None:
        value = model.terminal_log_prob(z)
    else:
        value = -0.5 * sum_event((z.double() / base_std) ** 2)
        value = value - z[0].numel() * (0.5 * math.log(2 * math.pi) + math.log(base_std)) if z.shape[0] else value
    x, change, nfe = z, 0.0, 0
    status = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    if trajectory is not None:
        trajectory(times[0], x)
    with evaluating(model):
        for t, s in pairwise(times):
            moved = transport(
                model, x, t, s, divergence, probes, rtol=rtol, atol=atol, method=method, max_nfe=max_nfe, cond=cond
            )
            x, change, nfe = moved.x, change + moved.change, nfe + moved.nfe
            status = torch.maximum(status, moved.status)
            if trajectory is not None:
                trajectory(s, x)
    whole = Transport(x, change, nfe, status)
    return x, from_transport(value, change, whole, z, divergence)


def from_transport(start: Tensor, change: Tensor, moved: Transport, latent: Tensor, divergence: Divergence) -> LogProb:
    """Log densities from the known density `start` (B,) and the estimates `change` (B, k) of what is added to it."""
    done = moved.status == ode.OK
    value = torch.where(done, start + change.mean(1), torch.nan)
    if isinstance(divergence, Exact):
        stderr = torch.zeros_like(value)
    elif change.shape[1] > 1:
        stderr = change.std(1) / math.sqrt(change.shape[1])
    else:
        stderr = torch.full_like(value, torch.nan)
    return LogProb(value, torch.where(done, stderr, torch.nan), latent, moved.nfe, moved.status)
