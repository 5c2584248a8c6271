r"""The probability-flow ODE in coordinates where it is mild: the angle path.

Layer 2. With the data's scale c = sigma_data, put $\theta = \mathrm{atan2}(\sigma, \alpha c)$ and
$u = x / \sqrt{\alpha^2 c^2 + \sigma^2} = \cos\theta\,x_0/c + \sin\theta\,\epsilon$. Along the probability flow

$$\frac{du}{d\theta} = \cos\theta\,\hat\epsilon(x, t) - \sin\theta\,D(x, t)/c,$$

for every affine SDE: no drift, no diffusion coefficient, and nothing that grows at either end. It is the change of
variables x = alpha y, dy = eps_hat d(sigma/alpha) (Song et al. 2021, equation 13; Karras et al. 2022, equation 1),
rotated so that the state keeps unit variance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scoresde.models.base import ScoreModel
from scoresde.sde import SDE, expand


class AnglePath:
    """Maps between (x, t) and (u, theta) for one SDE and data scale. Times and angles are float64."""

    def __init__(self, sde: SDE, sigma_data: float = 1.0):
        self.sde = sde
        self.c = sigma_data

    def angle(self, t: Tensor | float) -> Tensor:
        """theta(t) in (0, pi/2], increasing in t."""
        return torch.atan2(self.sde.sigma(t), self.sde.alpha(t) * self.c)

    def scale(self, t: Tensor | float) -> Tensor:
        """sqrt(alpha^2 c^2 + sigma^2); x = scale u."""
        return torch.hypot(self.sde.sigma(t), self.sde.alpha(t) * self.c)

    def time(self, theta: Tensor, low: float, high: float) -> Tensor:
        """t(theta), kept within [low, high], the ends of the solve, which rounding could otherwise leave."""
        return self.sde.time(-2 * torch.log(torch.tan(theta) * self.c)).clamp(low, high)

    def velocity(
        self, model: ScoreModel, u: Tensor, theta: Tensor, ends: tuple[float, float], cond: Any = None
    ) -> Tensor:
        """du/dtheta for u (B, *) and theta (B,); one evaluation of the model."""
        t = self.time(theta, *ends)
        x = expand(self.scale(t), u) * u
        denoised, noise = model.predict(x, t, cond)
        return expand(torch.cos(theta), u) * noise - expand(torch.sin(theta) / self.c, u) * denoised
