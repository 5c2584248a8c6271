r"""First-order samplers: a formula for (A, B, C) each.

Layer 3. Notation: $a = \alpha_t/\alpha_s$ and $v = \sigma_t^2 - a^2\sigma_s^2$ belong to the exact forward transition
from s to t, $x_t = a x_s + \sqrt{v} z$; $h = t - s$. The score is written with the denoiser,
$\nabla\log p = (\alpha D - x)/\sigma^2$.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import Grid, balanced, uniform_time
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource
from scoresde.samplers.base import LinearSampler, Sampler, State, transition
from scoresde.sde import SDE


class EulerMaruyama(LinearSampler):
    r"""Euler-Maruyama on a reverse SDE:

    $$x_s = x_t - \left[f x_t - \tfrac{1 + \eta^2}{2}\,g^2\,\nabla\log p_t(x_t)\right] h + \eta\,g\sqrt{h}\,z .$$

    eta = 1 is Anderson's reverse SDE (Song et al. 2021, equation 6), eta = 0 the probability flow, and every eta >= 0 has
    the same marginals (Zhang & Chen 2021, proposition 1).
    """

    default_steps = 500

    def __init__(self, eta: float = 1.0):
        if not (math.isfinite(eta) and eta >= 0):
            raise ValueError(f"eta must be a finite number >= 0, got {eta}.")
        self.eta = float(eta)
        self.stochastic = eta > 0
        self.convergence_order = None if eta else 1

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        h = t - s
        f, g2 = sde.drift_scale(t), sde.diffusion(t) ** 2
        pull = 0.5 * (1 + self.eta**2) * g2 * h / sde.sigma(t) ** 2
        return 1 - f * h - pull, pull * sde.alpha(t), self.eta * (g2 * h).sqrt()


class FlowEuler(LinearSampler):
    r"""Euler on the probability flow in t, what is used with rectified flow, the signal's part taken exactly:

    $$x_s = x_t + (\alpha_s - \alpha_t)\,D + (s - t)\,\dot\sigma\hat\epsilon .$$

    Where alpha is linear in t this is x_t + (s - t) v with the velocity v; elsewhere that formula would depend on where the data's
    mean is. Order 1. (`DDIM` takes the noise's part exactly as well, and on rectified flow the two are the same.)
    """

    stochastic = False
    default_steps = 100
    denoise_final = False
    convergence_order = 1

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        rate = (s - t) * sde.sigma_dot(t) / sde.sigma(t)
        return 1 + rate, sde.alpha(s) - (1 + rate) * sde.alpha(t), torch.zeros_like(t)


class Hold(Sampler[tuple[()]]):
    """x_s = x_t, without a network call: the predictor of a corrector-only sampler (Song et al. 2021, table 1)."""

    stochastic = False
    nfe_per_step = 0

    def __init__(self, grid: Grid = uniform_time):
        self.grid = grid

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        return x


class ReverseDiffusion(LinearSampler):
    r"""The forward step turned around (Song et al. 2021, equation 46):

    $$x_s = x_t - (a - 1)\,x_t + v\,\nabla\log p_t(x_t) + \sqrt{v}\,z .$$

    The paper discretises with beta(t)/N; the exact transition used here agrees with it to second order in 1/N and
    stays finite however few the steps.
    """

    default_steps = 500

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        a, v = transition(sde, t, s)
        pull = v / sde.sigma(t) ** 2
        return 2 - a - pull, pull * sde.alpha(t), v.sqrt()


class Ancestral(LinearSampler):
    r"""A draw from q(x_s | x_t, x_0 = D(x_t, t)): DDPM's rule for VP, SMLD's for VE, the same formula for the rest:

    $$x_s = \frac{a\,\sigma_s^2\,x_t + \alpha_s\,v\,D(x_t, t)}{\sigma_t^2} + C\,z, \qquad C^2 = \frac{\sigma_s^2}{\sigma_t^2}\,v$$

    with the posterior's variance (`variance="small"`), or C^2 = v (`"large"`, Song et al. 2021, equation 4). The mean is
    (x + v score) / a.
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
    r"""Denoise, then noise again to the level of s, with the noise that was found and a share eta of new noise:

    $$x_s = \alpha_s\,D(x_t, t) + \sqrt{\sigma_s^2 - C^2}\;\hat\epsilon(x_t, t) + C\,z,
      \qquad C = \eta\,\frac{\sigma_s}{\sigma_t}\sqrt{v} .$$

    Song, Meng & Ermon 2021, equations 12 and 16, in continuous time. eta = 0 is the probability flow, first order;
    eta = 1 is the ancestral sampler.
    """

    default_steps = 50
    grid = partial(balanced, rho=3.0)

    def __init__(self, eta: float = 0.0):
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {eta}.")
        self.eta = eta
        self.stochastic = eta > 0
        self.convergence_order = None if eta else 1

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        _, v = transition(sde, t, s)
        sigma_t, sigma_s = sde.sigma(t), sde.sigma(s)
        noise = self.eta * sigma_s * v.sqrt() / sigma_t
        # eps_hat = (x - alpha_t D) / sigma_t
        keep = torch.sqrt((sigma_s**2 - noise**2).clamp_min(0)) / sigma_t
        return keep, sde.alpha(s) - sde.alpha(t) * keep, noise
