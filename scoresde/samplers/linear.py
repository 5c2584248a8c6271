r"""First-order samplers: a formula for (A, B, C) each.

Layer 3. Notation: $a = \alpha_t/\alpha_s$ and $v = \sigma_t^2 - a^2\sigma_s^2$ belong to the exact forward transition
from s to t, $x_t = a x_s + \sqrt{v} z$; $h = t - s$. The score is written with the denoiser,
$\nabla\log p = (\alpha D - x)/\sigma^2$.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import Grid, angle, uniform_time
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource
from scoresde.samplers.base import LinearSampler, Sampler, State, transition
from scoresde.sde import SDE


class EulerMaruyama(LinearSampler):
    """Euler-Maruyama on a reverse SDE: x_s = x - (f x - (1 + eta^2)/2 g^2 score) h + eta g sqrt(h) z.

    eta = 1 is Anderson's reverse SDE (Song et al. 2021, equation 6), eta = 0 the probability flow, and every eta >= 0 has
    the same marginals (Zhang & Chen 2021, proposition 1).
    """

    default_steps = 500

    def __init__(self, eta: float = 1.0):
        if not (math.isfinite(eta) and eta >= 0):
            raise ValueError(f"eta must be a finite number >= 0, got {eta}.")
        self.eta = float(eta)
        self.convergence_order = None if eta else 1

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        h = t - s
        f, g2 = sde.drift_scale(t), sde.diffusion(t) ** 2
        pull = 0.5 * (1 + self.eta**2) * g2 * h / sde.sigma(t) ** 2
        return 1 - f * h - pull, pull * sde.alpha(t), self.eta * (g2 * h).sqrt()


class FlowEuler(LinearSampler):
    """Euler on the probability flow in t: x_s = x + (s - t) velocity(x, t), what is used with rectified flow.

    Order 1. (`DDIM` is Euler in sigma/alpha, and on rectified flow the two are the same.)
    """

    default_steps = 100
    denoise_final = False
    convergence_order = 1

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        rate = (s - t) * sde.sigma_dot(t) / sde.sigma(t)
        return 1 + rate, (s - t) * sde.alpha_dot(t) - rate * sde.alpha(t), torch.zeros_like(t)


class Hold(Sampler):
    """Leaves x as it is, without a network call: the predictor of a corrector-only sampler (Song et al. 2021, table 1)."""

    nfe_per_step = 0

    def __init__(self, grid: Grid = uniform_time):
        self.grid = grid

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        return x


class ReverseDiffusion(LinearSampler):
    """The forward step turned around: x_s = x - (a - 1) x + v score + sqrt(v) z (Song et al. 2021, equation 46).

    The paper discretises with beta(t)/N; the exact transition used here agrees with it to second order in 1/N and
    stays finite however few the steps.
    """

    default_steps = 500

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        a, v = transition(sde, t, s)
        pull = v / sde.sigma(t) ** 2
        return 2 - a - pull, pull * sde.alpha(t), v.sqrt()


class Ancestral(LinearSampler):
    """A draw from q(x_s | x_t, x_0 = D(x_t, t)): DDPM's rule for VP, SMLD's for VE, the same formula for the rest.

    mean = (a sigma_s^2 x + alpha_s v D) / sigma_t^2, which is (x + v score) / a; the variance is the posterior's,
    sigma_s^2 v / sigma_t^2 (`variance="small"`), or v (`"large"`, Song et al. 2021, equation 4).
    Ho et al. 2020, equations 7 and 11; Song et al. 2021, equation 47.
    """

    default_steps = 500

    def __init__(self, variance: str = "small"):
        self.variance = checks.choice(variance, ("small", "large"), "variance of the ancestral sampler")

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        a, v = transition(sde, t, s)
        shrink = sde.sigma(s) ** 2 / sde.sigma(t) ** 2
        noise = v.sqrt() if self.variance == "large" else (shrink * v).sqrt()
        return a * shrink, sde.alpha(s) * v / sde.sigma(t) ** 2, noise


class DDIM(LinearSampler):
    """x_s = alpha_s D + sqrt(sigma_s^2 - C^2) eps_hat + C z, C = eta sigma_s sqrt(v) / sigma_t.

    Song, Meng & Ermon 2021, equations 12 and 16, in continuous time. eta = 0 is the probability flow, first order;
    eta = 1 is the ancestral sampler.
    """

    default_steps = 50
    grid = staticmethod(angle)

    def __init__(self, eta: float = 0.0):
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {eta}.")
        self.eta = eta
        self.convergence_order = None if eta else 1

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        _, v = transition(sde, t, s)
        sigma_t, sigma_s = sde.sigma(t), sde.sigma(s)
        noise = self.eta * sigma_s * v.sqrt() / sigma_t
        keep = torch.sqrt((sigma_s**2 - noise**2).clamp_min(0)) / sigma_t
        return keep, sde.alpha(s) - sde.alpha(t) * keep, noise
