"""`sample`, `encode` and `decode`: the public way to the samplers. Layer 3."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import Grid
from scoresde.likelihood.log_prob import log_prob
from scoresde.model import ScoreModel, check_cond, check_input, require_model
from scoresde.modes import device_of, dtype_of, evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.samplers import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Sampler,
    State,
    run,
    time_grid,
)

METHODS: dict[str, type[Sampler]] = {
    "pc": PredictorCorrector,
    "ode": ProbabilityFlow,
    "euler": EulerMaruyama,
    "reverse-diffusion": ReverseDiffusion,
    "ancestral": Ancestral,
    "ddim": DDIM,
    "heun": Heun,
}


def sampler_for(method: str | Sampler) -> Sampler:
    """The sampler behind a name of `METHODS`, with its defaults, or the given object itself."""
    if isinstance(method, Sampler):
        return method
    if isinstance(method, type) and issubclass(method, Sampler):
        raise TypeError(f"method is the class {method.__name__}; pass an object, {method.__name__}(...).")
    return METHODS[checks.choice(method, METHODS, "sampling method")]()


def sample(
    model: ScoreModel,
    shape: Sequence[int],
    *,
    method: str | Sampler = "pc",
    steps: int | None = None,
    seed: Seed = None,
    cond: Any = None,
    x_init: Tensor | None = None,
    progress: bool = False,
    return_log_prob: bool = False,
    grid: Grid | Tensor | None = None,
    trajectory: Callable[[float, Tensor], None] | None = None,
    denoise_final: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw samples by reversing the model's SDE.

    Arguments:
        shape: (B, *event), the batch first; B = 0 gives an empty tensor.
        method: a name of `METHODS` or a `Sampler` object.
        steps: intervals of the time grid; the method's default if None.
        seed: None, an int, a `torch.Generator`, or one int per sample; with one per sample a sample does not depend
            on the batch it is drawn in.
        cond: handed to the network unchanged.
        x_init: the state at the first time of the grid, in place of a draw from the prior.
        progress: show a progress bar.
        return_log_prob: also return log densities of the samples in nats, (B,) (deterministic methods: "ode").
        grid: a function of `scoresde.grids`, or decreasing times, in place of the method's own.
        trajectory: called with (t, x) at every time of the grid, for example a `samplers.Trajectory()`.
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
    times = time_grid(chosen, model.sde, steps, grid)
    start, end = float(times[0]), float(times[-1])
    if return_log_prob and end != model.sde.t_min:
        raise ValueError(
            f"return_log_prob answers for samples at t_min = {model.sde.t_min:g}, but the grid ends at t = {end:g}."
        )
    if x_init is None and start < model.sde.t_max:
        raise ValueError(
            f"the grid starts at t = {start:g}, before the prior at t_max = {model.sde.t_max:g}; pass x_init, the state "
            "there, for example sde.perturb(data, t, noise)."
        )
    check_cond(cond, shape[0])
    device, dtype = device_of(model), dtype_of(model)
    if x_init is not None:
        checks.same_shape(checks.batch(x_init, "x_init"), shape, "x_init")
        checks.finite(x_init, "x_init")
        dtype = torch.promote_types(dtype, x_init.dtype)
    noise = RandomSource(seed, device, shape[0])
    x = model.sde.prior_std * noise.normal(shape, dtype) if x_init is None else x_init.to(device, dtype, copy=True)
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
                denoise_final=False if return_log_prob else denoise_final,
            )
    if not return_log_prob:
        return x
    result = log_prob(model, x, rtol=chosen.rtol, atol=chosen.atol, method=chosen.method, cond=cond, seed=seed)
    return x, result.value


def encode(model: ScoreModel, x: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5, cond: Any = None) -> Tensor:
    """The latent at t = 1 of data x (B, *), by the probability flow; `decode` inverts it up to the tolerances."""
    check_input(model, x, cond)
    return _flow(model, x, model.sde.t_min, 1.0, rtol, atol, cond)


def decode(model: ScoreModel, z: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5, cond: Any = None) -> Tensor:
    """The data at t_min of a latent z (B, *) at t = 1, by the probability flow."""
    check_input(model, z, cond, "z")
    return _flow(model, z, 1.0, model.sde.t_min, rtol, atol, cond)


def _flow(model: ScoreModel, x: Tensor, start: float, end: float, rtol: float, atol: float, cond: Any) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sampler = ProbabilityFlow(rtol=rtol, atol=atol)
    with evaluating(model):
        return sampler.step(model, x, start, end, State(), RandomSource(0, x.device, x.shape[0]), cond)


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(n) for n in shape)
    except (TypeError, ValueError) as e:
        raise TypeError(f"shape must be a sequence of integers (B, *event), got {shape!r}.") from e
    if len(shape) < 2 or shape[0] < 0 or math.prod(shape[1:]) < 1 or min(shape[1:]) < 1:
        raise ValueError(f"shape must be (B, *event) with B >= 0 and every other size >= 1, got {shape}.")
    return shape
