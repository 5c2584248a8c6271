r"""Log density by the probability-flow ODE.

Layer 3. $\log p(x_{t_{min}}) = \log\pi(x_1) + $ the change along the flow, with $\pi$ the model's density at t = 1: the SDE's
prior for a network, the closed form for an exact mixture. The result is the density of the model's own marginal at t_min.

The change comes from one of two engines: `decoupled`, the trajectory first and its divergence afterwards
(`scoresde.likelihood.decoupled.quadrature`), or an embedded Runge-Kutta pair that carries both (`scoresde.likelihood.transport`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from scoresde import checks, conditions, ode
from scoresde.flow import AnglePath
from scoresde.grids import Grid
from scoresde.likelihood.decoupled.quadrature import LikelihoodPlan
from scoresde.likelihood.decoupled.refinement import (
    Refinement,
    differentiable_change,
    mean_and_error,
    refine,
    rounding_error,
    tolerance_of,
)
from scoresde.likelihood.dequantization import warn_if_quantized
from scoresde.likelihood.divergence import Divergence, Exact, check_divergence, default_divergence
from scoresde.likelihood.transport import Transport, transport
from scoresde.models.base import ScoreModel, check_input, require_model
from scoresde.models.prepared import network_dtype
from scoresde.modes import device_of, evaluating
from scoresde.rng import RandomSource, Seed, Streams
from scoresde.samplers import ProbabilityFlow, time_grid
from scoresde.samplers.setup import batch_shape, starting_state
from scoresde.sde import sum_event

PROBES = 1  # the salt of the probes' seed: they must not repeat the noise that a sample was drawn from
METHODS = ("decoupled", *ode.TABLEAUX)


@dataclass
class LogProb:
    """Log densities of a batch.

    `value` (B,) nats, float64, NaN where an example did not finish; `stderr` (B,) nats, the standard error from the
    trace estimate alone (0 for an exact trace, NaN for a single probe); `latent` (B, *), the example at t = 1; `nfe`
    (B,) evaluations of the network; `status` (B,), 0 where the solve finished (`scoresde.ode.STATUS_TEXT`).

    From the decoupled engine, in nats and NaN elsewhere: `trajectory_error` (B,), what the trajectory's error may have left in
    the value, and `quadrature_error` (B,), that of integrating the divergence along it (seen with exact traces; the plan's
    otherwise). An example of status `MAX_NFE` or `UNRESOLVED` may still have its value, and these say how good it is. For a
    network in bfloat16 or float16 `trajectory_error` is eps sqrt(d) at least, eps that of its dtype: what its rounding was
    measured to leave (d = 2 to 256), with either engine, and no refinement takes away.
    """

    value: Tensor
    stderr: Tensor
    latent: Tensor
    nfe: Tensor
    status: Tensor
    trajectory_error: Tensor | None = None
    quadrature_error: Tensor | None = None


def log_prob(
    model: ScoreModel,
    x: Tensor,
    *,
    divergence: Divergence | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "decoupled",
    stderr: float | None = None,
    differentiable: bool = False,
    plan: LikelihoodPlan | None = None,
    max_nfe: int = 10_000,
    seed: Seed = None,
    cond: Any = None,
) -> LogProb:
    """Log density of the model at x (B, *), in nats, by the probability-flow ODE.

    `divergence`: how the trace is taken, `default_divergence` unless given; `rtol`, `atol`: error per step of the Runge-Kutta
    methods; `max_nfe`: evaluations per example (4 at least) before it stops with a status; `seed`: of the probes, one int or
    one per example. `method`:

    * "decoupled": the trajectory by forward evaluations, then the divergence along it with new probes at every point. Each
      example is refined until its estimated error is below 10 (rtol + atol) nats, or rounding forbids more (those that no
      grid resolves go to "tsit5"). An estimated trace hides the rule's error, some 0.02 sqrt(d) nats on digits networks with the
      default plan: `plan_likelihood` measures it and chooses better, and the trajectory is held to 0.02 sqrt(d) nats;
    * "tsit5", "dopri5", "bosh3": both at once, adaptive Runge-Kutta with the probes fixed.

    With "decoupled" also: `stderr`, the standard error in nats that each example's trace estimate has to reach: probes are
    added until it does, and a warning says where max_nfe forbids it; `differentiable`: `value` and `latent` carry the graph
    to x and to the parameters (of the discretised value; memory grows with every evaluation); `plan`: where refinement starts,
    such as `plan_likelihood` returns.

    With one seed per example its result depends on that example and its seed alone, whatever its batch-mates need, up to the
    rounding with which a network treats batches of other sizes (a small float32 U-Net on 8 x 8 images: 1e-5 nats).

    Raises `ValueError` for NaN in x or a wrong shape, `TypeError` for integer x, `NonFiniteError` (naming t and the
    examples) for NaN from the network. Warns where the network's own precision forbids the tolerance.
    """
    check_input(model, x, cond)
    warn_if_quantized(x, "log_prob")
    for name, value in (("rtol", rtol), ("atol", atol)):
        checks.positive(value, name)
    checks.positive_int(max_nfe, "max_nfe")
    checks.choice(method, METHODS, "method of solution")
    _check_decoupled(method, stderr, differentiable, plan)
    divergence = _divergence(divergence, math.prod(x.shape[1:]))
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # the state of a solve is float32 at least
    if x.is_inference():
        with torch.inference_mode(False):
            x = x.clone()
    rounding = rounding_error(model, x)
    if rounding > tolerance_of(rtol, atol):
        warnings.warn(
            f"the network computes in {network_dtype(model, x)}, whose rounding leaves some {rounding:.2g} nats in a log density "
            f"of so many dimensions, more than the {tolerance_of(rtol, atol):.2g} asked for; score with the network in float32.",
            stacklevel=2,
        )
    streams = Streams(seed, x.device, x.shape[0], salt=PROBES)
    options: dict[str, Any] = dict(rtol=rtol, atol=atol, max_nfe=max_nfe)
    if method == "decoupled":
        options.update(stderr=stderr, differentiable=differentiable, plan=plan)
        result = _decoupled(model, x, divergence, streams, cond, **options)
    else:
        result = _coupled(model, x, divergence, streams.source(), cond, method=method, **options)
    if rounding:
        result.trajectory_error = torch.fmax(
            cast(Tensor, result.trajectory_error), torch.full_like(result.value, rounding)
        )
    return result


def _check_decoupled(method: str, stderr: Any, differentiable: Any, plan: Any) -> None:
    """The options of `log_prob` that only the decoupled engine knows."""
    if stderr is not None:
        checks.positive(stderr, "stderr")
    if not isinstance(differentiable, bool):
        raise TypeError(f"differentiable must be True or False, got {differentiable!r}.")
    if plan is not None and not isinstance(plan, LikelihoodPlan):
        raise TypeError(f"plan must be a LikelihoodPlan, such as plan_likelihood(model) returns, got {plan!r}.")
    if method != "decoupled" and (stderr is not None or differentiable or plan is not None):
        raise ValueError(f'stderr=, differentiable= and plan= are for method="decoupled", got method={method!r}.')
    if differentiable and stderr is not None:
        raise ValueError(
            "stderr= adds probes as it goes, which differentiable=True cannot follow; give probes instead."
        )


def _decoupled(
    model: ScoreModel,
    x: Tensor,
    divergence: Divergence,
    streams: Streams,
    cond: Any,
    *,
    rtol: float,
    atol: float,
    max_nfe: int,
    stderr: float | None,
    differentiable: bool,
    plan: LikelihoodPlan | None,
) -> LogProb:
    """By refinement example by example; those that no common grid resolves by an adaptive solve."""
    with evaluating(model):
        limits: dict[str, Any] = dict(tolerance=tolerance_of(rtol, atol), stderr=stderr, max_nfe=max_nfe)
        found = refine(model, x, divergence, streams, **limits, plan=plan, cond=cond)
        result = _from_refinement(model, found)
        if stderr is not None:
            _warn_if_short(found.stderr, stderr, max_nfe)
        lost = ~torch.isfinite(found.change)
        hard = (lost | (found.status == ode.UNRESOLVED)).nonzero().squeeze(1)
        if len(hard) and not differentiable:  # features too fine for common grids, or trajectories that ran away
            left = max_nfe - int(found.nfe[hard].max())
            if left > 0:
                _solve_adaptively(result, hard, model, x, divergence, streams, cond, rtol=rtol, atol=atol, max_nfe=left)
    if differentiable and x.shape[0]:
        if bool(lost.any()):
            rows = checks.rows_text(lost.nonzero().flatten().tolist())
            raise ValueError(f"rows {rows} have no value on a common grid that could be differentiated.")
        with evaluating(model, gradients=True):
            change, result.latent = differentiable_change(model, x, divergence, streams, found, cond)
            result.value = model.terminal_log_prob(result.latent) + change
    return result


def _divergence(given: Divergence | None, d: int) -> Divergence:
    """`given` after a check, or the default in d dimensions."""
    check_divergence(given)
    return default_divergence(d) if given is None else given


def _warn_if_short(found: Tensor, stderr: float, max_nfe: int) -> None:
    """Warn the caller of `log_prob` of examples whose standard error (B,) did not become as small as was asked for."""
    short = ~(found <= stderr)
    if bool(short.any()):
        warnings.warn(
            f"{int(short.sum())} of {len(short)} examples did not reach stderr={stderr:g} nats within max_nfe={max_nfe} "
            f"evaluations (largest {float(found.nan_to_num(nan=math.inf).max()):.3g}); raise max_nfe, or give divergence= more "
            "probes.",
            stacklevel=4,
        )


def _solve_adaptively(
    result: LogProb,
    rows: Tensor,
    model: ScoreModel,
    x: Tensor,
    divergence: Divergence,
    streams: Streams,
    cond: Any,
    **options: Any,
) -> None:
    """Solve these rows adaptively, and keep what is found for those that finish."""
    found = _coupled(
        model, x[rows], divergence, streams.source(rows), conditions.take_rows(cond, rows), method="tsit5", **options
    )
    result.nfe[rows] += found.nfe
    better = (found.status == ode.OK) | ~torch.isfinite(result.value[rows])
    for name in ("value", "stderr", "latent", "status", "trajectory_error", "quadrature_error"):
        getattr(result, name)[rows[better]] = getattr(found, name)[better]


def _from_refinement(model: ScoreModel, found: Refinement) -> LogProb:
    return LogProb(
        model.terminal_log_prob(found.latent) + found.change,
        found.stderr,
        found.latent,
        found.nfe,
        found.status,
        found.trajectory_error,
        found.quadrature_error,
    )


def _coupled(
    model: ScoreModel, x: Tensor, divergence: Divergence, source: RandomSource, cond: Any, **options: Any
) -> LogProb:
    """By one adaptive solve of the trajectory and the divergence."""
    probes = divergence.probes(x.shape, x.dtype, source)
    with evaluating(model):
        moved = transport(model, x, model.sde.t_min, 1.0, divergence, probes, cond=cond, **options)
    return from_transport(model.terminal_log_prob(moved.x), -moved.change, moved, moved.x, divergence)


def sample_with_log_prob(
    model: ScoreModel,
    shape: Sequence[int],
    *,
    divergence: Divergence | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "tsit5",
    max_nfe: int = 10_000,
    steps: int | None = None,
    seed: Seed = None,
    cond: Any = None,
    x_init: Tensor | None = None,
    grid: Grid | Tensor | None = None,
    t_max: float | None = None,
    trajectory: Callable[[float, Tensor], None] | None = None,
) -> tuple[Tensor, LogProb]:
    """Draw samples by the probability flow, with their log densities at t_min from the same solve.

    `divergence`, `rtol`, `atol`, `max_nfe` and the Runge-Kutta `method` as for `log_prob`, the rest as for `sample` with
    method="ode". Returns (x, result): x (B, *) and a `LogProb` whose `latent` is the state that the flow started from.
    Examples that do not finish carry a status and a NaN value. Raises `ValueError` for a grid that does not end at t_min, and
    for an x_init at a time where its density is not known.
    """
    require_model(model)
    shape = batch_shape(shape)
    model.check_event(shape[1:])
    conditions.check(cond, shape[0])
    times = time_grid(ProbabilityFlow(rtol, atol, method, max_nfe), model, steps, grid, t_max, shape[1:])
    start, end = float(times[0]), float(times[-1])
    if end != model.sde.t_min:
        raise ValueError(
            f"log densities are those of samples at t_min = {model.sde.t_min:g}, but the grid ends at t = {end:g}."
        )
    if x_init is not None and (t_max is not None or start < model.sde.t_max):
        raise ValueError(
            f"the log density of x_init at t = {start:g} is not known; start at t_max = {model.sde.t_max:g}, or draw the samples "
            "and ask log_prob for theirs."
        )
    noise = RandomSource(seed, device_of(model), shape[0])
    z, std = starting_state(model, shape, times, noise, x_init, t_max)
    return _carried(
        model,
        z.to(torch.promote_types(z.dtype, torch.float32)),
        times.tolist(),
        std,
        _divergence(divergence, math.prod(shape[1:])),
        seed,
        trajectory,
        dict(rtol=rtol, atol=atol, method=method, max_nfe=max_nfe, cond=cond),
    )


def _carried(
    model: ScoreModel,
    z: Tensor,
    times: Sequence[float],
    std: float | None,
    divergence: Divergence,
    seed: Seed,
    trajectory: Callable[[float, Tensor], None] | None,
    options: dict[str, Any],
) -> tuple[Tensor, LogProb]:
    """z (B, *) from times[0] to times[-1] with its log density: at times[0] that of `starting_state`, for std None the model's."""
    probes = divergence.probes(z.shape, z.dtype, RandomSource(seed, z.device, z.shape[0], salt=PROBES))
    if std is None:
        value = model.terminal_log_prob(z)
    else:
        u = AnglePath(model.sde, model.sigma_data, model.data_mean).rotated(z.double(), times[0])
        value = -0.5 * sum_event(u**2)
        value = value - math.prod(z.shape[1:]) * (0.5 * math.log(2 * math.pi) + math.log(std))
    x = z
    change: Tensor | float = 0.0
    nfe: Tensor | int = 0
    status = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    if trajectory is not None:
        trajectory(times[0], x)
    with evaluating(model):
        for t, s in pairwise(times):
            moved = transport(model, x, t, s, divergence, probes, **options)
            x, change, nfe = moved.x, change + moved.change, nfe + moved.nfe
            status = torch.maximum(status, moved.status)
            if trajectory is not None:
                trajectory(s, x)
    whole = Transport(x, cast(Tensor, change), cast(Tensor, nfe), status)
    return x, from_transport(value, whole.change, whole, z, divergence)


def from_transport(start: Tensor, change: Tensor, moved: Transport, latent: Tensor, divergence: Divergence) -> LogProb:
    """Log densities from the known density `start` (B,) and the estimates `change` (B, k) of what is added to it."""
    done = moved.status == ode.OK
    mean, error = mean_and_error(change, isinstance(divergence, Exact))
    return LogProb(
        torch.where(done, start + mean, torch.nan),
        torch.where(done, error, torch.nan),
        latent,
        moved.nfe,
        moved.status,
        torch.full_like(mean, torch.nan),
        torch.full_like(mean, torch.nan),
    )
