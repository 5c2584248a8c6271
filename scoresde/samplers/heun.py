"""Heun's method on the probability flow, and EDM's stochastic sampler around it (Karras et al. 2022). Layer 3."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import karras
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource
from scoresde.samplers.base import Coefficients, Sampler, State, add_times, affine_at
from scoresde.sde import SDE


class Heun(Sampler):
    """Second order, two evaluations a step, in y = x / alpha and r = sigma / alpha, where dy/dr = eps_hat.

    y_s = y_t + (r_s - r_t) (eps_hat_t + eps_hat_s) / 2, with eps_hat_s at the Euler point. With the grid of Karras et
    al. and the final denoiser (their last Euler step, to sigma = 0) this is their deterministic sampler on any SDE.
    """

    default_steps = 40
    nfe_per_step = 2
    saved_at_zero = 1
    convergence_order = 2
    grid = staticmethod(karras)

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        alpha_t, alpha_s, sigma_t, sigma_s = sde.alpha(t), sde.alpha(s), sde.sigma(t), sde.sigma(s)
        keep = alpha_s / alpha_t
        return keep, sigma_s - keep * sigma_t, sigma_s

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        return _heun(model, x, t, s, self.lookup(model, state, t, s), cond)


def _heun(model: ScoreModel, x: Tensor, t: float, s: float, row: Coefficients, cond: Any) -> Tensor:
    keep, gain, sigma_s = row
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


class StochasticHeun(Sampler):
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2): noise is added, then a Heun step takes it out again.

    With r = sigma/alpha and y = x/alpha, a step at s_min <= r_t <= s_max first moves up to r' = (1 + gamma) r_t, y' = y +
    sqrt(r'^2 - r_t^2) s_noise z, gamma = min(s_churn/N, sqrt(2) - 1) for the N steps of the grid (the final denoiser,
    which the paper counts too, left out), and never past the process' own start.
    Arguments: `s_churn`, `s_min`, `s_max`, `s_noise`; the defaults are the paper's for CIFAR-10.
    """

    default_steps = 40
    nfe_per_step = 2
    saved_at_zero = 1
    grid = staticmethod(karras)

    def __init__(self, s_churn: float = 30.0, s_min: float = 0.01, s_max: float = 1.0, s_noise: float = 1.007):
        if not (s_churn >= 0 and 0 <= s_min <= s_max):
            raise ValueError(f"need s_churn >= 0 and 0 <= s_min <= s_max, got {s_churn}, {s_min}, {s_max}.")
        self.s_churn, self.s_min, self.s_max = s_churn, s_min, s_max
        self.s_noise = checks.positive(s_noise, "s_noise")

    def start(self, model: ScoreModel, times: Tensor) -> State:
        state = super().start(model, times)
        add_times(model, torch.tensor([row[0] for row in state.table.values()], dtype=torch.float64))
        return state

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        gamma = min(self.s_churn / t.numel(), math.sqrt(2) - 1)  # t holds all the steps of the solve
        log_r = -0.5 * sde.log_snr(t)
        r = log_r.exp()
        top = -0.5 * float(sde.log_snr(sde.t_max))
        raised = (log_r + math.log1p(gamma)).clamp_max(top)
        churned = (r >= self.s_min) & (r <= self.s_max) & (raised > log_r)
        up = torch.where(churned, sde.time(-2 * raised), t)
        lift = sde.alpha(up) / sde.alpha(t)
        noise = self.s_noise * (sde.sigma(up) ** 2 - (lift * sde.sigma(t)) ** 2).clamp_min(0).sqrt()
        noise = torch.where(churned, noise, torch.zeros_like(noise))
        return up, lift, noise, *Heun.coefficients(self, sde, up, s)

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        up, lift, spread, *row = self.lookup(model, state, t, s)
        if spread:
            x = torch.mul(x, lift).add_(noise.normal(x.shape, x.dtype), alpha=spread)
        return _heun(model, x, up, s, row, cond)
