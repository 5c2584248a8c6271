"""Heun's method on the probability flow, and EDM's stochastic sampler around it (Karras et al. 2022). Layer 3."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import karras
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State, add_times, affine_at
from scoresde.sde import SDE


class HeunRow(NamedTuple):
    """x_s = keep x_t + gain (eps_hat_t + eps_hat_s)/2: keep = alpha_s/alpha_t, gain = alpha_s (r_s - r_t); and sigma_s."""

    keep: float
    gain: float
    sigma: float


class ChurnedRow(NamedTuple):
    """Up to the time `up` by x = lift x + noise z, then a Heun step from there (`HeunRow`)."""

    up: float
    lift: float
    noise: float
    keep: float
    gain: float
    sigma: float


class Heun(Sampler[HeunRow]):
    r"""Second order, two evaluations a step, in y = x / alpha and r = sigma / alpha, where dy/dr = eps_hat:

    $$y_s = y_t + (r_s - r_t)\,\tfrac12\left[\hat\epsilon(y_t, t) + \hat\epsilon(y'_s, s)\right],
      \qquad y'_s = y_t + (r_s - r_t)\,\hat\epsilon(y_t, t) .$$

    With the grid of Karras et al. and the final denoiser (their last Euler step, to sigma = 0) this is their deterministic sampler
    on any SDE.
    """

    stochastic = False
    row_type = HeunRow
    default_steps = 40
    nfe_per_step = 2
    saved_at_zero = 1
    convergence_order = 2
    grid = staticmethod(karras)

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return _coefficients(sde, t, s)

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        return _heun(model, x, t, s, *self.row(model, state, t, s), cond)


def _coefficients(sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of `HeunRow`."""
    alpha_t, alpha_s, sigma_t, sigma_s = sde.alpha(t), sde.alpha(s), sde.sigma(t), sde.sigma(s)
    keep = alpha_s / alpha_t
    return keep, sigma_s - keep * sigma_t, sigma_s


def _heun(
    model: ScoreModel, x: Tensor, t: float, s: float, keep: float, gain: float, sigma_s: float, cond: Any
) -> Tensor:
    p, q = affine_at(model, t)[2:]
    slope = torch.mul(x, p).add_(model.output(x, t, cond), alpha=q)
    base = keep * x
    euler = torch.add(base, slope, alpha=gain)
    if sigma_s == 0:  # the end of the path: the slope there is undefined and the Euler point is the denoiser
        return euler
    p, q = affine_at(model, s)[2:]
    half = 0.5 * gain
    base.add_(slope, alpha=half).add_(euler, alpha=half * p)
    return base.add_(model.output(euler, s, cond), alpha=half * q)


class StochasticHeun(Sampler[ChurnedRow]):
    r"""EDM's stochastic sampler (Karras et al. 2022, algorithm 2): noise is added, then a `Heun` step takes it out again.

    With r = sigma/alpha and y = x/alpha, a step at s_min <= r_t <= s_max first moves up,

    $$r' = (1 + \gamma)\,r_t, \qquad y' = y_t + \sqrt{r'^2 - r_t^2}\;s_{noise}\,z, \qquad \gamma = \min(s_{churn}/N, \sqrt2 - 1),$$

    for the N steps of a solve (the final denoiser, which the paper counts too, left out), and never past the process' own start.
    Arguments: `s_churn`, `s_min`, `s_max`, `s_noise`, the paper's for CIFAR-10 by default; `churn_steps`, N where it is not the
    number of steps of the grid. A single step outside of a solve needs it: without, it raises `ValueError`.
    """

    row_type = ChurnedRow
    default_steps = 40
    nfe_per_step = 2
    saved_at_zero = 1
    grid = staticmethod(karras)

    def __init__(
        self,
        s_churn: float = 30.0,
        s_min: float = 0.01,
        s_max: float = 1.0,
        s_noise: float = 1.007,
        churn_steps: int | None = None,
    ):
        if not (s_churn >= 0 and 0 <= s_min <= s_max):
            raise ValueError(f"need s_churn >= 0 and 0 <= s_min <= s_max, got {s_churn}, {s_min}, {s_max}.")
        self.s_churn, self.s_min, self.s_max = s_churn, s_min, s_max
        self.s_noise = checks.positive(s_noise, "s_noise")
        self.churn_steps = None if churn_steps is None else checks.positive_int(churn_steps, "churn_steps")
        self.stochastic = s_churn > 0

    def gamma(self, steps: int) -> float:
        """How far a step of a solve of so many moves up, relative to its noise level."""
        return min(self.s_churn / (self.churn_steps or steps), math.sqrt(2) - 1)

    def alone(self, model: ScoreModel, t: float, s: float) -> State[ChurnedRow]:
        if self.stochastic and self.churn_steps is None:
            raise ValueError(
                "a single step of StochasticHeun needs to know how many share s_churn: pass churn_steps, or the state that "
                "start(model, times) makes for the whole grid."
            )
        return super().alone(model, t, s)

    def rows(self, model: ScoreModel, times: Tensor) -> list[ChurnedRow]:
        rows = super().rows(model, times)
        add_times(model, torch.tensor([row.up for row in rows], dtype=torch.float64))
        return rows

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        gamma = self.gamma(t.numel())
        log_r = -0.5 * sde.log_snr(t)
        r = log_r.exp()
        top = -0.5 * float(sde.log_snr(sde.t_max))
        raised = (log_r + math.log1p(gamma)).clamp_max(top)
        churned = (r >= self.s_min) & (r <= self.s_max) & (raised > log_r)
        up = torch.where(churned, sde.time(-2 * raised), t)
        lift = sde.alpha(up) / sde.alpha(t)
        noise = self.s_noise * (sde.sigma(up) ** 2 - (lift * sde.sigma(t)) ** 2).clamp_min(0).sqrt()
        noise = torch.where(churned, noise, torch.zeros_like(noise))
        return up, lift, noise, *_coefficients(sde, up, s)

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        up, lift, spread, keep, gain, sigma = self.row(model, state, t, s)
        if spread:
            x = torch.mul(x, lift).add_(noise.normal(x.shape, x.dtype), alpha=spread)
        return _heun(model, x, up, s, keep, gain, sigma, cond)
