"""Heun's method on the probability flow (Karras et al. 2022, algorithm 1 without churn). Layer 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scoresde.grids import karras
from scoresde.model import ScoreModel
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State
from scoresde.sde import SDE


class Heun(Sampler):
    """Second order, two evaluations a step, in y = x / alpha and r = sigma / alpha, where dy/dr = eps_hat.

    y_s = y_t + (r_s - r_t) (eps_hat_t + eps_hat_s) / 2, with eps_hat_s at the Euler point. With the grid of Karras et
    al. and the final denoiser (their last Euler step, to sigma = 0) this is their deterministic sampler on any SDE.
    """

    default_steps = 40
    nfe_per_step = 2
    grid = staticmethod(karras)

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        alpha_t, alpha_s, sigma_t, sigma_s = sde.alpha(t), sde.alpha(s), sde.sigma(t), sde.sigma(s)
        keep = alpha_s / alpha_t
        return keep, sigma_s - keep * sigma_t, alpha_t, sigma_t, alpha_s, sigma_s

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        keep, gain, alpha_t, sigma_t, alpha_s, sigma_s = self.lookup(model, state, t, s)
        slope = torch.add(x, model.denoise(x, t, cond), alpha=-alpha_t).div_(sigma_t)
        euler = torch.add(keep * x, slope, alpha=gain)
        if sigma_s == 0:  # the end of the path: the slope there is undefined and the Euler point is the denoiser
            return euler
        slope_s = torch.add(euler, model.denoise(euler, s, cond), alpha=-alpha_s).div_(sigma_s)
        return torch.add(keep * x, slope.add_(slope_s), alpha=0.5 * gain)
