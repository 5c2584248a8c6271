"""Time grids: functions from an SDE and a number of steps to decreasing float64 times, t_max first, t_min last.

Layer 1. Any sampler runs on any grid. Every grid takes `t_max`, an earlier start than the process' own (few-step samplers
gain by it: at high noise the denoiser is the data's mean and there is little to be asked).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from scoresde import checks
from scoresde.sde import SDE, check_monotone

FLOOR = 0.002
Grid: TypeAlias = "Callable[..., Tensor]"


def uniform_time(sde: SDE, steps: int, *, t_max: float | None = None) -> Tensor:
    """steps + 1 times equally spaced in t."""
    high, low = ends_of(sde, steps, t_max).tolist()
    return torch.linspace(high, low, steps + 1, dtype=torch.float64)


def uniform_log_snr(sde: SDE, steps: int, *, t_max: float | None = None) -> Tensor:
    """steps + 1 times equally spaced in log-SNR."""
    return _by_ratio(sde, steps, t_max, torch.log, torch.exp)


def karras(sde: SDE, steps: int, rho: float = 7.0, *, t_max: float | None = None) -> Tensor:
    """steps + 1 times with (sigma/alpha)^(1/rho) equally spaced (Karras et al. 2022, equation 5)."""
    checks.positive(rho, "rho")
    return _by_ratio(sde, steps, t_max, lambda r: r ** (1 / rho), lambda v: v**rho)


def angle(sde: SDE, steps: int, scale: float = 1.0, *, t_max: float | None = None) -> Tensor:
    """steps + 1 times with arctan(sigma / (alpha scale)) equally spaced; `scale`: standard deviation of the data.

    For a variance-preserving process and scale 1 these are the equal angles of the cosine schedule (Nichol & Dhariwal 2021).
    """
    checks.positive(scale, "scale")
    return _by_ratio(sde, steps, t_max, lambda r: torch.atan(r / scale), lambda v: scale * torch.tan(v))


def balanced(sde: SDE, steps: int, spread: float = 1.0, rho: float = 5.0, *, t_max: float | None = None) -> Tensor:
    """steps + 1 times with (r / (r + 2 spread))^(1/rho), r = sigma/alpha, equally spaced.

    `spread`: the root mean square distance of an example from the data's mean, sigma_data sqrt(d) (`spread_of`). Below it a power
    of r, as the grid of Karras et al. 2022, above it of 1/r: while the noise is larger than everything that tells examples apart
    there is little to be asked. `rho`: more points at high noise for a larger one. `sample` hands over the spread of its model.
    """
    k, rho = 2 * checks.positive(spread, "spread"), checks.positive(rho, "rho")
    return _by_ratio(sde, steps, t_max, lambda r: (r / (r + k)) ** (1 / rho), lambda v: k * v**rho / (1 - v**rho))


def takes_spread(grid: Grid) -> bool:
    """Whether a grid is `balanced`, or a partial of it, which depends on the data."""
    return getattr(grid, "func", grid) is balanced


def spread_of(sigma_data: float, event_shape: Sequence[int]) -> float:
    """sigma_data sqrt(d): the root mean square distance of an example, d numbers, from the mean of all."""
    return sigma_data * math.sqrt(math.prod(event_shape))


def cosine(sde: SDE, steps: int, *, t_max: float | None = None) -> Tensor:
    """steps + 1 times t_min + (t_max - t_min) (1 - cos(pi u / 2)), u equally spaced: dense towards the data."""
    ends = ends_of(sde, steps, t_max)
    high, low = ends.tolist()
    u = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return _with_ends(low + (high - low) * (1 - torch.cos(0.5 * torch.pi * u)), ends)


def given(times: Sequence[float] | Tensor) -> Grid:
    """A grid of exactly these times; `steps` has to agree.

    Raises `TypeError` for what is no sequence of real numbers (booleans and complex numbers are none), `ValueError` unless they
    decrease strictly within [0, 1].
    """
    try:
        t = torch.as_tensor(times)
        real = not (t.is_complex() or t.dtype == torch.bool)
    except (TypeError, ValueError, RuntimeError):
        real = False
    if not real:
        raise TypeError(
            f"a time grid must be real numbers, or a function such as scoresde.grids.karras, got {_shown(times)}."
        )
    t = torch.as_tensor(times, dtype=torch.float64, device="cpu")  # Python's numbers would have become float32
    if t.dim() != 1:
        raise ValueError(f"a time grid must be one-dimensional, got shape {tuple(t.shape)}.")
    if t.numel() < 2 or not bool((t[1:] < t[:-1]).all()) or not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(
            f"a time grid must decrease strictly within [0, 1] and have at least two times, got {_shown(t.tolist())}."
        )

    def grid(sde: SDE, steps: int, *, t_max: float | None = None) -> Tensor:
        if t_max is not None:
            raise ValueError("t_max does not go with given times: leave out the times above it.")
        if steps != t.numel() - 1:
            raise ValueError(f"the given grid has {t.numel() - 1} steps, asked for {steps}.")
        return t

    return grid


def _shown(value: object, limit: int = 200) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."


def ends_of(sde: SDE, steps: int, t_max: float | None) -> Tensor:
    """(t_max, t_min) after checks; `t_max` None for the process' own."""
    checks.positive_int(steps, "steps")
    high = sde.t_max if t_max is None else float(t_max)
    if not sde.t_min < high <= sde.t_max:
        raise ValueError(f"t_max must lie in ({sde.t_min:g}, {sde.t_max:g}], got {t_max}.")
    ends = torch.tensor([high, sde.t_min], dtype=torch.float64)
    check_monotone(sde, ends)
    if float(sde.alpha(high)) == 0.0:
        raise ValueError(
            f"alpha is 0 at t_max = {high:g}, where nothing but noise is left and samplers that divide by it are undefined; set "
            "t_max a little lower in the SDE (RectifiedFlow uses 0.999) or pass t_max."
        )
    return ends


def _by_ratio(
    sde: SDE, steps: int, t_max: float | None, warp: Callable[[Tensor], Tensor], unwarp: Callable[[Tensor], Tensor]
) -> Tensor:
    """steps + 1 times equally spaced in warp(sigma/alpha).

    Where sigma is 0 at t_min the last step is the one to it, and the grid proper ends at sigma/alpha = 0.002, the sigma_min of
    Karras et al.: a warp of 0 may be infinite, and points at vanishing noise would be wasted.
    """
    ends = ends_of(sde, steps, t_max)
    ratios = torch.exp(-0.5 * sde.log_snr(ends))
    to_zero = float(sde.sigma(ends[1])) == 0.0
    if to_zero:
        ratios[1] = torch.minimum(0.5 * ratios[0], torch.full_like(ratios[1], FLOOR))
    high, low = warp(ratios).tolist()
    warped = torch.linspace(high, low, steps + (not to_zero), dtype=torch.float64)
    t = sde.time(-2 * torch.log(unwarp(warped)))
    return _with_ends(torch.cat([t, ends[1:]]) if to_zero else t, ends)


def _with_ends(t: Tensor, ends: Tensor) -> Tensor:
    """The same grid with its two ends exact (the inverse log-SNR rounds)."""
    t = t.clone()
    t[0], t[-1] = ends
    return t
