"""Time grids: functions from an SDE and a number of steps to decreasing float64 times, t_max first, t_min last.

Layer 1. Any sampler runs on any grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from scoresde import checks
from scoresde.sde import SDE

Grid: TypeAlias = "Callable[[SDE, int], Tensor]"


def uniform_time(sde: SDE, steps: int) -> Tensor:
    """steps + 1 times equally spaced in t."""
    checks.positive_int(steps, "steps")
    return torch.linspace(sde.t_max, sde.t_min, steps + 1, dtype=torch.float64)


def uniform_log_snr(sde: SDE, steps: int) -> Tensor:
    """steps + 1 times equally spaced in log-SNR."""
    checks.positive_int(steps, "steps")
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    low, high = sde.log_snr(ends).tolist()
    return _with_ends(sde.time(torch.linspace(low, high, steps + 1, dtype=torch.float64)), sde)


def karras(sde: SDE, steps: int, rho: float = 7.0) -> Tensor:
    """steps + 1 times with (sigma/alpha)^(1/rho) equally spaced (Karras et al. 2022, equation 5)."""
    checks.positive_int(steps, "steps")
    checks.positive(rho, "rho")
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    high, low = torch.exp(-0.5 * sde.log_snr(ends) / rho).tolist()
    warped = torch.linspace(high, low, steps + 1, dtype=torch.float64)
    return _with_ends(sde.time(-2 * rho * torch.log(warped)), sde)


def given(times: Sequence[float] | Tensor) -> Grid:
    """A grid of exactly these times; `steps` has to agree. Raises `ValueError` unless they decrease strictly in [0, 1]."""
    t = torch.as_tensor(times, dtype=torch.float64).flatten()
    if t.numel() < 2 or not bool((t[1:] < t[:-1]).all()) or not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(
            f"a time grid must decrease strictly within [0, 1] and have at least two times, got {t.tolist()}."
        )

    def grid(sde: SDE, steps: int) -> Tensor:
        if steps != t.numel() - 1:
            raise ValueError(f"the given grid has {t.numel() - 1} steps, asked for {steps}.")
        return t

    return grid


def _with_ends(t: Tensor, sde: SDE) -> Tensor:
    """The same grid with its two ends exactly t_max and t_min (the inverse log-SNR rounds)."""
    t = t.clone()
    t[0], t[-1] = sde.t_max, sde.t_min
    return t
