"""`sample`: the public way to the samplers. Layer 3."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde import checks, conditions, ode
from scoresde.flow import AnglePath
from scoresde.grids import Grid
from scoresde.likelihood.density import generate
from scoresde.models.base import ScoreModel, require_model
from scoresde.modes import device_of, dtype_of, evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.samplers import FewStep, PathNoise, ProbabilityFlow, Sampler, run, sampler_for, steps_within, time_grid


def sample(
    model: ScoreModel,
    shape: Sequence[int],
    *,
    method: str | Sampler = "pc",
    steps: int | None = None,
    nfe: int | None = None,
    seed: Seed = None,
    cond: Any = None,
    x_init: Tensor | None = None,
    progress: bool = False,
    return_log_prob: bool = False,
    grid: Grid | Tensor | None = None,
    t_max: float | None = None,
    brownian: bool = False,
    compile: bool = False,
    trajectory: Callable[[float, Tensor], None] | None = None,
    denoise_final: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw samples by reversing the model's SDE.

    Arguments:
        shape: (B, *event), the batch first; B = 0 gives an empty tensor.
        method: a name of `METHODS` or a `Sampler` object.
        steps: intervals of the time grid; the method's default if None. For "auto" and tuned samplers the number of
            network evaluations: their first interval, from the prior to the first evaluation, costs none.
        nfe: in place of `steps`, evaluations of the network in all, the final denoiser included.
        seed: None, an int, a `torch.Generator`, or one int per sample; with one per sample a sample does not depend
            on the batch it is drawn in.
        cond: handed to the network unchanged.
        x_init: the state at the first time of the grid, in place of a draw from the prior.
        progress: show a progress bar (none with return_log_prob).
        return_log_prob: also return log densities of the samples in nats, (B,) (deterministic methods: "ode").
        grid: a function of `scoresde.grids`, or decreasing times, in place of the method's own.
        t_max: start at this time in place of the process' own, from N(0, alpha^2 sigma_data^2 + sigma^2), the marginal
            there of Gaussian data (for a sigma_max: t_max = float(sde.time(-2 * math.log(sigma_max)))).
        brownian: take the noise of a stochastic method's steps from one Brownian path in t (`samplers.BrownianPath`), so that
            runs with one seed and more and more steps follow the same path.
        trajectory: called with (t, x) at every time of the grid, for example a `samplers.Trajectory()`.
        compile: run the network of a fixed-step method through `torch.compile` (on CUDA captured as a graph). The first
            call takes from seconds to minutes; a U-Net then gains, a small MLP may lose. Each network is compiled once.
        denoise_final: end with the denoiser at t_min; None leaves the method's own rule.

    Returns samples of the given shape on the model's device, in float32 (float64 for a float64 network or `x_init`).
    Raises `ValueError` for an unknown method (listing them), a bad shape, steps < 1 or seeds of the wrong number, and
    `NonFiniteError` when NaN or infinity appear, naming the step, t and the samples.
    """
    require_model(model)
    chosen = sampler_for(method)
    shape = _shape(shape)
    model.check_event(shape[1:])
    if return_log_prob and not isinstance(chosen, ProbabilityFlow):
        raise ValueError("return_log_prob needs the probability flow: use method='ode'.")
    if return_log_prob and denoise_final:
        raise ValueError("return_log_prob is the density of samples at t_min; it does not go with denoise_final=True.")
    if nfe is not None:
        if steps is not None:
            raise ValueError(f"pass steps or nfe, not both; got steps={steps} and nfe={nfe}.")
        if grid is not None and not callable(grid):
            raise ValueError(f"given times fix the number of steps; leave out nfe={nfe}.")
        steps = steps_within(chosen, model.sde, nfe, denoise_final)
    if trajectory is not None and not callable(trajectory):
        raise TypeError(
            f"trajectory must be called with (t, x), for example samplers.Trajectory(); got {trajectory!r}."
        )
    times = time_grid(chosen, model, steps, grid, t_max)
    start, end = float(times[0]), float(times[-1])
    if return_log_prob and end != model.sde.t_min:
        raise ValueError(
            f"return_log_prob answers for samples at t_min = {model.sde.t_min:g}, but the grid ends at t = {end:g}."
        )
    if return_log_prob and x_init is not None and (t_max is not None or start < model.sde.t_max):
        raise ValueError(
            f"the log density of x_init at t = {start:g} is not known; start at t_max = {model.sde.t_max:g}, or draw the samples "
            "and ask log_prob for theirs."
        )
    if brownian and (chosen.convergence_order is not None or isinstance(chosen, (ProbabilityFlow, FewStep))):
        raise ValueError(f"brownian=True is for stochastic methods; {type(chosen).__name__} draws no noise.")
    if x_init is None and t_max is None and start < model.sde.t_max:
        raise ValueError(
            f"the grid starts at t = {start:g}, before the prior at t_max = {model.sde.t_max:g}; pass x_init, the state "
            "there, for example sde.perturb(data, t, noise), or t_max to draw it from a Gaussian."
        )
    conditions.check(cond, shape[0])
    device, dtype = device_of(model), dtype_of(model)
    if x_init is not None:
        checks.same_shape(checks.batch(x_init, "x_init"), shape, "x_init")
        checks.finite(x_init, "x_init")
        dtype = torch.promote_types(dtype, x_init.dtype)
    noise = RandomSource(seed, device, shape[0])
    scale = None if t_max is None else float(AnglePath(model.sde, model.sigma_data).scale(start))
    if x_init is None:
        x = (model.sde.prior_std if scale is None else scale) * noise.normal(shape, dtype)
    else:
        x = x_init.to(device, dtype, copy=True)
    if brownian and shape[0]:
        noise = PathNoise(noise, shape, end, start, dtype)
    if return_log_prob:
        settings = dict(rtol=chosen.rtol, atol=chosen.atol, method=chosen.method, max_nfe=chosen.max_nfe)
        x, result = generate(
            model, x, times.tolist(), **settings, seed=seed, cond=cond, trajectory=trajectory, base_std=scale
        )
        if bool((result.status != ode.OK).any()):
            rows = (result.status != ode.OK).nonzero().flatten().tolist()
            raise RuntimeError(
                f"the ODE solve failed in {len(rows)} of {shape[0]} samples, rows {checks.rows_text(rows)}: "
                f"{ode.STATUS_TEXT[int(result.status.max())]}. Raise max_nfe or loosen rtol and atol."
            )
        chosen.nfe = float(result.nfe.double().mean()) if shape[0] else 0.0
        return x, result.value
    with evaluating(model):
        if shape[0]:
            x = run(
                chosen,
                model,
                x,
                times,
                noise,
                cond=cond,
                progress=progress,
                trajectory=trajectory,
                denoise_final=denoise_final,
                compile=compile,
            )
    return x


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(n) for n in shape)
    except (TypeError, ValueError) as e:
        raise TypeError(f"shape must be a sequence of integers (B, *event), got {shape!r}.") from e
    if len(shape) < 2 or shape[0] < 0 or math.prod(shape[1:]) < 1 or min(shape[1:]) < 1:
        raise ValueError(f"shape must be (B, *event) with B >= 0 and every other size >= 1, got {shape}.")
    return shape
