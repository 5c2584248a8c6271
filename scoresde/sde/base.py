r"""Forward processes: one affine SDE, six schedules.

Layer 1. Every process here is $dx = f(t)\,x\,dt + g(t)\,dw$ on $t \in [0, 1]$ (0 = data, 1 = prior), so that

$$x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon, \qquad \epsilon \sim N(0, I),$$

and two functions, `alpha` and `sigma`, define it. The rest follows:

$$f = \dot\alpha / \alpha, \qquad g^2 = 2\sigma(\dot\sigma - f\sigma), \qquad \lambda = \log(\alpha^2 / \sigma^2).$$

A subclass has to give `alpha` and `sigma`; the time derivatives then come from automatic differentiation and the
inverse of the log-SNR from bisection. The built-in processes override both with closed forms.

Times are tensors of any shape, or Python numbers (taken as float64). Results have the shape and dtype of t.

References: Song et al. 2021, "Score-based generative modeling through SDEs", section 3.4 and appendix B (VP, sub-VP,
VE); Kingma et al. 2021, "Variational diffusion models" (log-SNR); Karras et al. 2022 (EDM); Nichol & Dhariwal 2021 and
Hoogeboom et al. 2023 (cosine); Liu et al. 2022, Lipman et al. 2023 (rectified flow).
"""

from __future__ import annotations

import functools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.numerics import bisect
from scoresde.rng import RandomSource, Seed


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape () or (B,) in the dtype of x (B, *), shaped so that it multiplies x row by row."""
    c = coefficient.to(dtype=x.dtype, device=x.device)
    return c.reshape(c.shape + (1,) * (x.dim() - 1)) if c.dim() else c


def sum_event(x: Tensor) -> Tensor:
    """Sum over all axes but the first: (B, *) -> (B,)."""
    return x.flatten(1).sum(1)


class SDE(ABC):
    """Base of all forward processes. `t_min` is where samplers stop and likelihoods start; `t_max` where they meet the prior."""

    t_min: float = 1e-5
    t_max: float = 1.0

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """Signal scale alpha(t), same shape as t."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise standard deviation sigma(t), same shape as t."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        """A subclass' functions may be written for tensors of times in [0, 1] alone, and may return a constant."""
        super().__init_subclass__(**kwargs)
        for name in (*_OF_TIME, "time"):
            function = getattr(cls, name)  # of a mixin, maybe
            if not getattr(function, "is_schedule", False) and not getattr(function, "__isabstractmethod__", False):
                setattr(cls, name, _schedule(function, checks.log_snr_like if name == "time" else checks.time_like))

    # -- derived, overridable ------------------------------------------------------------------------------------

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        """d alpha / dt."""
        return derivative(self.alpha, as_tensor(t))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        """d sigma / dt."""
        return derivative(self.sigma, as_tensor(t))

    def half_variance_rate(self, t: Tensor | float) -> Tensor:
        """sigma d sigma / dt, which stays finite where sigma = 0."""
        return self.sigma(t) * self.sigma_dot(t)

    def drift_scale(self, t: Tensor | float) -> Tensor:
        """f(t) = d log alpha / dt; the drift is f(t) x."""
        return self.alpha_dot(t) / self.alpha(t)

    def drift(self, x: Tensor, t: Tensor | float) -> Tensor:
        """f(t) x for x (B, *) and t () or (B,)."""
        checks.batch(x)
        checks.time_like(t, x.shape[0])
        return expand(self.drift_scale(t), x) * x

    def diffusion(self, t: Tensor | float) -> Tensor:
        """g(t), same shape as t."""
        sigma = self.sigma(t)
        return (2 * sigma * (self.sigma_dot(t) - self.drift_scale(t) * sigma)).clamp_min(0).sqrt()

    def log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha^2 / sigma^2), strictly decreasing in t.

        Where alpha or sigma is exactly 0 (an infinite log-SNR) it stands at the smallest normal number of the dtype
        instead, so that the result is finite and still the extreme one.
        """
        return 2 * (safe_log(self.alpha(t)) - safe_log(self.sigma(t)))

    def time(self, log_snr: Tensor | float) -> Tensor:
        """The t at which `log_snr(t)` has the given value (bisection in float64, error below 1e-15).

        Values beyond the schedule's own give the nearest end here; the closed forms of subclasses continue past it.
        """
        target = as_tensor(log_snr)
        return bisect(lambda t: -self.log_snr(t), -target).to(target.dtype)

    def perturb(self, x0: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) noise for x0, noise (B, *) and t () or (B,)."""
        checks.batch(x0, "x0")
        checks.time_like(t, x0.shape[0])
        checks.same_shape(noise, x0.shape, "the noise given to perturb")
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    @property
    def prior_std(self) -> float:
        """Standard deviation of the Gaussian prior at t = 1."""
        return float(self.sigma(1.0))

    def prior_sample(
        self,
        shape: Sequence[int],
        seed: Seed = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """A draw from N(0, prior_std^2 I) of the given shape (B, *)."""
        return self.prior_std * RandomSource(seed, device, shape[0]).normal(shape, dtype)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log density of the prior at x (B, *), in nats, shape (B,), float64."""
        checks.batch(x)
        d = x[0].numel() if x.shape[0] else math.prod(x.shape[1:])
        std = self.prior_std
        return -0.5 * sum_event(x.double() ** 2) / std**2 - d * (0.5 * math.log(2 * math.pi) + math.log(std))


_OF_TIME = (
    "alpha", "sigma", "alpha_dot", "sigma_dot", "half_variance_rate", "drift_scale", "diffusion", "log_snr"
)  # fmt: skip
_nested = threading.local()


def _schedule(function: Callable[..., Any], check: Callable[[Any], None]) -> Callable[[SDE, Tensor | float], Tensor]:
    """`function` for numbers too (as float64 tensors), of what passes `check` alone, its result of the argument's shape.

    These functions call one another; what the outermost was given is checked, once.
    """

    @functools.wraps(function)
    def wrapped(self: SDE, t: Tensor | float) -> Tensor:
        outer = not getattr(_nested, "inside", False)
        if outer:
            check(t)
            _nested.inside = True
        try:
            t = as_tensor(t)
            value = function(self, t)
        finally:
            if outer:
                _nested.inside = False
        if value is t:  # which the caller may write to
            return t.clone()
        if not isinstance(value, Tensor):
            value = torch.full_like(t, value)
        if value.shape == t.shape:
            return value
        if value.dim():
            checks.same_shape(value, t.shape, f"{type(self).__name__}.{function.__name__}(t)")
        return value.expand(t.shape)

    vars(wrapped)["is_schedule"] = True
    return wrapped


def as_tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


def safe_log(value: Tensor) -> Tensor:
    return value.clamp_min(torch.finfo(value.dtype).tiny).log()


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Elementwise derivative by automatic differentiation, also inside no_grad and inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = t.clone().detach().requires_grad_(True)
        value = function(leaf)
        if not value.requires_grad:  # a constant function
            return torch.zeros_like(t)
        return torch.autograd.grad(value.sum(), leaf)[0]


def check_t_min(t_min: float) -> None:
    if not 0.0 <= checks.number(t_min, "t_min") < 1.0:
        raise ValueError(f"t_min must lie in [0, 1), got {t_min}; samplers run from t_max = 1 down to t_min.")


def check_monotone(sde: SDE, times: Tensor) -> None:
    """`ValueError` naming t and the values unless a user's `sde` loses signal all the way through float64 `times` on the CPU.

    That is, on these times and on 64 equal parts between their ends: alpha > 0 and sigma > 0, except that sigma may be 0 at the
    first and alpha at the last, and sigma/alpha increases. Steps, weights and densities mean nothing otherwise.
    """
    if type(sde).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return  # ours are so by construction, and a solve in a hundred steps is short
    given = times.detach().double().sort().values
    low, high = float(given[0]), float(given[-1])
    t = torch.cat([given, torch.linspace(low, high, 65, dtype=torch.float64)])
    alpha, sigma = sde.alpha(t).detach(), sde.sigma(t).detach()
    sound = torch.isfinite(alpha) & torch.isfinite(sigma)
    sound &= (alpha > 0) | ((alpha == 0) & (t == high))
    sound &= (sigma > 0) | ((sigma == 0) & (t == low))
    if not bool(sound.all()):
        i = int((~sound).nonzero()[0])
        raise ValueError(
            f"{type(sde).__name__} has alpha = {float(alpha[i]):g} and sigma = {float(sigma[i]):g} at t = {float(t[i]):g}; "
            "both must be finite and > 0 (sigma may be 0 at the first time, alpha at the last)."
        )
    rise = (sigma.log() - alpha.log()).diff()
    flat = rise <= 0
    flat[: len(given)] = rise[: len(given)] < -1e-9  # times that are close may differ by rounding alone
    flat[len(given) - 1] = False  # from the last time back to the first
    if low < high and bool(flat.any()):
        i = int(flat.nonzero()[0])
        values = " and ".join(f"{float(sigma[k] / alpha[k]):g} at t = {float(t[k]):g}" for k in (i, i + 1))
        raise ValueError(
            f"{type(sde).__name__} does not lose signal all the way: sigma/alpha is {values}, and has to increase with t "
            "(its log-SNR has to decrease strictly)."
        )
