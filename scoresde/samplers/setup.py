"""What is settled before the first step: the shape, the times, the number of steps, the state that a solve starts from. Layer 3."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.flow import AnglePath
from scoresde.grids import Grid, given, takes_spread
from scoresde.models.base import ScoreModel
from scoresde.modes import device_of, dtype_of
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, data_spread
from scoresde.sde import SDE

MAX_STEPS = 1_000_000  # a grid and its rows take about a kilobyte a step


def batch_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as (B, *event). Raises `TypeError` unless it holds integers, `ValueError` for sizes that no batch has."""
    try:
        shape = tuple(operator.index(n) for n in shape)
    except (TypeError, ValueError) as e:
        raise TypeError(f"shape must be a sequence of integers (B, *event), got {shape!r}.") from e
    if len(shape) < 2 or shape[0] < 0 or math.prod(shape[1:]) < 1 or min(shape[1:]) < 1:
        raise ValueError(f"shape must be (B, *event) with B >= 0 and every other size >= 1, got {shape}.")
    return shape


def time_grid(
    sampler: Sampler,
    model: ScoreModel,
    steps: int | None,
    grid: Grid | Tensor | None = None,
    t_max: float | None = None,
    event_shape: Sequence[int] | None = None,
) -> Tensor:
    """The decreasing float64 times of a solve, for examples of `event_shape` where the model does not say it.

    Raises `ValueError` unless 1 <= steps <= 1,000,000 and for a grid that does not decrease or has another number of steps,
    `TypeError` for steps or times that are no such numbers.
    """
    if t_max is not None:
        if isinstance(t_max, bool) or not isinstance(t_max, numbers.Real | Tensor):
            raise TypeError(f"t_max must be a time between t_min and {model.sde.t_max:g}, got {t_max!r}.")
        t_max = float(t_max)
    unset = steps is None
    steps = sampler.default_steps if steps is None else checks.positive_int(steps, "steps")
    if grid is not None and not callable(grid):
        function = given(grid)
        steps = len(grid) - 1 if unset else steps
        grid = function
    if steps > MAX_STEPS:
        raise ValueError(f"steps must be at most {MAX_STEPS}, got {steps}.")
    if grid is None:
        times = sampler.times(model, steps, t_max, event_shape)
    else:
        options: dict[str, Any] = {} if t_max is None else {"t_max": t_max}
        if takes_spread(grid):
            options["spread"] = data_spread(model, event_shape)
        times = _times_of(grid(model.sde, steps, **options), steps)
    if not bool((times[1:] < times[:-1]).all()):
        raise ValueError(
            f"the time grid of {steps} steps does not decrease strictly (two times coincide in float64); use fewer steps."
        )
    return times


def _times_of(times: Any, steps: int) -> Tensor:
    """What a grid function returned, in float64 on the host, if it is `steps` + 1 times."""
    if not isinstance(times, Tensor) or not times.is_floating_point():
        got = times.dtype if isinstance(times, Tensor) else type(times).__name__
        raise TypeError(f"a grid function must return a floating-point tensor of times, got {got}.")
    if tuple(times.shape) != (steps + 1,):
        raise ValueError(
            f"a grid of {steps} steps has {steps + 1} times, the function gave shape {tuple(times.shape)}."
        )
    return times.to("cpu", torch.float64)


def steps_within(sampler: Sampler, sde: SDE, nfe: int, denoise_final: bool | None) -> int:
    """The number of steps to t_min that costs exactly `nfe` network evaluations, the final denoiser included.

    Raises `ValueError` where there is none, naming the nearest budgets that there are.
    """
    checks.positive_int(nfe, "nfe")
    each, final = sampler.nfe_per_step, int(sampler.denoise_final if denoise_final is None else denoise_final)
    name = type(sampler).__name__
    if sampler.adaptive or each is None:
        raise ValueError(f"{name} chooses its own number of network evaluations; set its tolerances instead of nfe.")
    if each == 0:
        raise ValueError(f"{name} makes no network evaluations; pass steps instead of nfe.")
    if float(sde.sigma(sde.t_min)) == 0.0:
        final -= sampler.saved_at_zero
    steps, left = divmod(nfe - final, each)
    if steps < 1 or left:
        low = max(steps, 1) * each + final
        fits = f"{low}" if low > nfe else f"{low} or {low + each}"
        raise ValueError(
            f"{name} costs {each} evaluations a step{' and one for the final denoiser' if final > 0 else ''}, so nfe = {nfe} "
            f"cannot be met exactly; ask for {fits}{', or pass denoise_final=False' if final > 0 and nfe % each == 0 else ''}."
        )
    return steps


def check_arguments(
    chosen: Sampler,
    *,
    steps: int | None,
    nfe: int | None,
    grid: Grid | Tensor | None,
    brownian: bool,
    trajectory: Callable[[float, Tensor], None] | None,
    denoise_final: bool | None,
    return_log_prob: bool,
) -> None:
    """What does not go together among the options of `scoresde.sample`. Raises `ValueError`, `TypeError` for a wrong kind."""
    if nfe is not None and steps is not None:
        raise ValueError(f"pass steps or nfe, not both; got steps={steps} and nfe={nfe}.")
    if nfe is not None and grid is not None and not callable(grid):
        raise ValueError(f"given times fix the number of steps; leave out nfe={nfe}.")
    if brownian and not chosen.stochastic:
        raise ValueError(f"brownian=True is for stochastic methods; {type(chosen).__name__} draws no noise.")
    if return_log_prob and chosen.solve_options is None:
        raise ValueError("return_log_prob needs the probability flow: use method='ode'.")
    if return_log_prob and denoise_final:
        raise ValueError("return_log_prob is the density of samples at t_min; it does not go with denoise_final=True.")
    if denoise_final is not None and not isinstance(denoise_final, bool):
        raise TypeError(f"denoise_final must be True, False or None for the method's own rule, got {denoise_final!r}.")
    if trajectory is not None and not callable(trajectory):
        raise TypeError(
            f"trajectory must be called with (t, x), for example samplers.Trajectory(); got {trajectory!r}."
        )


def starting_state(
    model: ScoreModel,
    shape: tuple[int, ...],
    times: Tensor,
    noise: RandomSource,
    x_init: Tensor | None,
    t_max: float | None,
) -> tuple[Tensor, float | None]:
    """(x, std): the state at times[0], and the standard deviation of the Gaussian that it was drawn from.

    `x_init` if it is given; else a draw from the prior (std None: the model knows its own density there) or, for `t_max`, from the
    marginal of Gaussian data, of variance alpha^2 sigma_data^2 + sigma^2 around alpha `data_mean` (0 where that is not known). In
    the model's dtype, or x_init's where that is wider. Raises `ValueError` for a start below the prior with nothing to start from,
    and for an x_init that does not fit.
    """
    start, dtype = float(times[0]), dtype_of(model)
    path = AnglePath(model.sde, model.sigma_data, model.data_mean)
    std = None if t_max is None else float(path.scale(start))
    if x_init is not None:
        checks.same_shape(checks.batch(x_init, "x_init"), shape, "x_init")
        checks.finite(x_init, "x_init")
        return x_init.to(device_of(model), torch.promote_types(dtype, x_init.dtype), copy=True), std
    if t_max is None and start < model.sde.t_max:
        raise ValueError(
            f"the grid starts at t = {start:g}, before the prior at t_max = {model.sde.t_max:g}; pass x_init, the state "
            "there, for example sde.perturb(data, t, noise), or t_max to draw it from a Gaussian."
        )
    z = noise.normal(shape, dtype)
    return (model.sde.prior_std * z if std is None else path.unrotated(z, start)), std
