"""`sample`: the public way to the samplers. Layer 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from scoresde import checks, conditions, ode
from scoresde.grids import Grid
from scoresde.likelihood.density import sample_with_log_prob
from scoresde.models.base import ScoreModel, require_model
from scoresde.modes import device_of, evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.samplers import PathNoise, Sampler, run, sampler_for, steps_within, time_grid
from scoresde.samplers.setup import batch_shape, check_arguments, starting_state


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
        return_log_prob: also return log densities of the samples in nats, (B,), for "ode" (`sample_with_log_prob` says more).
        grid: a function of `scoresde.grids`, or decreasing times, in place of the method's own.
        t_max: start at this time in place of the process' own, from N(alpha data_mean, alpha^2 sigma_data^2 + sigma^2), the
            marginal there of Gaussian data (for a sigma_max: t_max = float(sde.time(-2 * math.log(sigma_max)))).
        brownian: take the noise of a stochastic method's steps from one Brownian path in t (`samplers.BrownianPath`), so that
            runs with one seed and more and more steps follow the same path.
        trajectory: called with (t, x) at every time of the grid, for example a `samplers.Trajectory()`.
        compile: run the network of a fixed-step method through `torch.compile` (on CUDA captured as a graph). The first
            call takes from seconds to minutes; a U-Net then gains, a small MLP may lose. Each network is compiled once.
        denoise_final: end with the denoiser at t_min; None leaves the method's own rule.

    Returns samples of the given shape on the model's device, in float32 (float64 for a float64 network or `x_init`).
    Raises `ValueError` for an unknown method (listing them), a bad shape, steps out of range or seeds of the wrong number, and
    `NonFiniteError` when NaN or infinity appear, naming the step, t and the samples.
    """
    require_model(model)
    chosen = sampler_for(method)
    shape = batch_shape(shape)
    model.check_event(shape[1:])
    conditions.check(cond, shape[0])
    check_arguments(
        chosen,
        steps=steps,
        nfe=nfe,
        grid=grid,
        brownian=brownian,
        trajectory=trajectory,
        denoise_final=denoise_final,
        return_log_prob=return_log_prob,
    )
    if grid is not None:
        chosen = chosen.on_given_grid()
    if nfe is not None:
        steps = steps_within(chosen, model.sde, nfe, denoise_final)
    if return_log_prob:
        start = dict(steps=steps, seed=seed, cond=cond, x_init=x_init, grid=grid, t_max=t_max, trajectory=trajectory)
        return _with_values(chosen, model, shape, **start)
    times = time_grid(chosen, model, steps, grid, t_max, shape[1:])
    noise = RandomSource(seed, device_of(model), shape[0])
    x, _ = starting_state(model, shape, times, noise, x_init, t_max)
    if not shape[0]:
        return x
    if brownian:
        noise = PathNoise(noise, shape, float(times[-1]), float(times[0]), x.dtype)
    with evaluating(model):
        return run(
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


def _with_values(chosen: Sampler, model: ScoreModel, shape: tuple[int, ...], **start: Any) -> tuple[Tensor, Tensor]:
    """Samples and their log densities alone. Raises `RuntimeError` if the solve of one failed."""
    x, result = sample_with_log_prob(model, shape, **(chosen.solve_options or {}), **start)
    failed = (result.status != ode.OK).nonzero().flatten().tolist()
    if failed:
        raise RuntimeError(
            f"the ODE solve failed in {len(failed)} of {shape[0]} samples, rows {checks.rows_text(failed)}: "
            f"{ode.STATUS_TEXT[int(result.status.max())]}. Raise max_nfe or loosen rtol and atol."
        )
    chosen.nfe = float(result.nfe.double().mean()) if shape[0] else 0.0
    return x, result.value
