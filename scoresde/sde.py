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

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde import checks
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
        """A subclass' alpha and sigma may be written for tensors alone, and may return a constant."""
        super().__init_subclass__(**kwargs)
        for name in ("alpha", "sigma"):
            if name in vars(cls):
                setattr(cls, name, _schedule(vars(cls)[name]))

    # -- derived, overridable ------------------------------------------------------------------------------------

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        """d alpha / dt."""
        return _derivative(self.alpha, self._time(t))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        """d sigma / dt."""
        return _derivative(self.sigma, self._time(t))

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
        return 2 * (_safe_log(self.alpha(t)) - _safe_log(self.sigma(t)))

    def time(self, log_snr: Tensor | float) -> Tensor:
        """The t at which `log_snr(t)` has the given value (bisection in float64, error below 1e-15).

        Values beyond the schedule's own give the nearest end here; the closed forms of subclasses continue past it.
        """
        target = _as_tensor(log_snr)
        goal = target.double()
        low, high = torch.zeros_like(goal), torch.ones_like(goal)
        for _ in range(54):
            middle = (low + high) / 2
            above = self.log_snr(middle) > goal
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return ((low + high) / 2).to(target.dtype)

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

    # -- private -------------------------------------------------------------------------------------------------

    @staticmethod
    def _time(t: Tensor | float) -> Tensor:
        checks.time_like(t)
        return _as_tensor(t)


def _schedule(function: Callable[[SDE, Tensor], Tensor]) -> Callable[[SDE, Tensor | float], Tensor]:
    """`function` for numbers too (as float64 tensors), its result of t's shape."""

    @functools.wraps(function)
    def wrapped(self: SDE, t: Tensor | float) -> Tensor:
        if not isinstance(t, Tensor):
            checks.time_like(t)
            t = _as_tensor(t)
        value = function(self, t)
        if not isinstance(value, Tensor):
            value = torch.full_like(t, value)
        return value if value.shape == t.shape else value.expand(t.shape)

    return wrapped


def _as_tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


def _safe_log(value: Tensor) -> Tensor:
    return value.clamp_min(torch.finfo(value.dtype).tiny).log()


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Elementwise derivative by automatic differentiation, also inside no_grad and inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = t.clone().detach().requires_grad_(True)
        value = function(leaf)
        if not value.requires_grad:  # a constant function
            return torch.zeros_like(t)
        return torch.autograd.grad(value.sum(), leaf)[0]


def _check_t_min(t_min: float) -> None:
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min must lie in [0, 1), got {t_min}; samplers run from t_max = 1 down to t_min.")


@dataclasses.dataclass(frozen=True)
class _LinearBeta(SDE):
    """What VP and sub-VP share: beta(t) = beta_min + t (beta_max - beta_min), and B(t), its integral from 0."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        checks.ordered(self.beta_min, self.beta_max, "beta_min", "beta_max")
        _check_t_min(self.t_min)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _integral_inverse(self, b: Tensor) -> Tensor:
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b).sqrt()
        return 2 * b / (self.beta_min + root)  # the form of the quadratic formula that does not cancel

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(-0.5 * self._integral(self._time(t)))

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return self.drift_scale(t) * self.alpha(t)

    def drift_scale(self, t: Tensor | float) -> Tensor:
        return -0.5 * self._beta(self._time(t))

    @property
    def prior_std(self) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBeta):
    """Variance preserving (Song et al. 2021, equations 11 and 32): f = -beta/2, g = sqrt(beta), alpha^2 + sigma^2 = 1."""

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(self._time(t))))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        t = self._time(t)
        return 0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def half_variance_rate(self, t: Tensor | float) -> Tensor:
        return 0.5 * self._beta(self._time(t)) * self.alpha(t) ** 2

    def diffusion(self, t: Tensor | float) -> Tensor:
        return self._beta(self._time(t)).sqrt()

    def log_snr(self, t: Tensor | float) -> Tensor:
        b = self._integral(self._time(t))
        return -b - _safe_log(-torch.expm1(-b))

    def time(self, log_snr: Tensor | float) -> Tensor:
        lam = _as_tensor(log_snr)
        wide = -lam.double()  # softplus written out: torch's own returns its argument above 20
        b = wide.clamp_min(0) + torch.log1p(torch.exp(-wide.abs()))
        return self._integral_inverse(b).to(lam.dtype)


@dataclasses.dataclass(frozen=True)
class SubVPSDE(_LinearBeta):
    """Sub-variance-preserving (Song et al. 2021, equations 13 and 29): sigma = 1 - exp(-B), g^2 = beta (1 - exp(-2B))."""

    def sigma(self, t: Tensor | float) -> Tensor:
        return -torch.expm1(-self._integral(self._time(t)))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        t = self._time(t)
        return self._beta(t) * self.alpha(t) ** 2

    def diffusion(self, t: Tensor | float) -> Tensor:
        t = self._time(t)
        return torch.sqrt(-self._beta(t) * torch.expm1(-2 * self._integral(t)))

    def log_snr(self, t: Tensor | float) -> Tensor:
        b = self._integral(self._time(t))
        return -b - 2 * _safe_log(-torch.expm1(-b))

    def time(self, log_snr: Tensor | float) -> Tensor:
        # r = alpha / (1 - alpha^2) solved for alpha, in the form that is exact on either side of r = 1
        lam = _as_tensor(log_snr)
        r = torch.exp(0.5 * lam.double())
        sigma = 2 / (1 + torch.sqrt(1 + 4 * r * r))
        b = torch.where(r < 1, -2 * _safe_log(r * sigma), -torch.log1p(-sigma.clamp_max(0.9)))
        return self._integral_inverse(b).to(lam.dtype)


class _VarianceExploding(SDE):
    """alpha = 1: the noise is added to data that keep their scale."""

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(self._time(t))

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(self._time(t))


@dataclasses.dataclass(frozen=True)
class VESDE(_VarianceExploding):
    """Variance exploding (Song et al. 2021, equations 9 and 30): sigma = sigma_min (sigma_max / sigma_min)^t."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        checks.ordered(self.sigma_min, self.sigma_max, "sigma_min", "sigma_max")
        _check_t_min(self.t_min)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Tensor | float) -> Tensor:
        return self.sigma_min * torch.exp(self._time(t) * self._log_ratio)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return self.sigma(t) * self._log_ratio

    def diffusion(self, t: Tensor | float) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._log_ratio)

    def time(self, log_snr: Tensor | float) -> Tensor:
        return (-0.5 * _as_tensor(log_snr) - math.log(self.sigma_min)) / self._log_ratio


@dataclasses.dataclass(frozen=True)
class EDMSDE(_VarianceExploding):
    """Karras et al. 2022 on unit time: sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho.

    A uniform grid in t is then the time grid of their equation 5. The process itself is dx = sqrt(2 sigma sigma') dw.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    t_min: float = 0.0

    def __post_init__(self) -> None:
        checks.ordered(self.sigma_min, self.sigma_max, "sigma_min", "sigma_max")
        checks.positive(self.rho, "rho")
        _check_t_min(self.t_min)

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def sigma(self, t: Tensor | float) -> Tensor:
        low, high = self._ends
        return (low + self._time(t) * (high - low)) ** self.rho

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        low, high = self._ends
        return self.rho * (high - low) * (low + self._time(t) * (high - low)) ** (self.rho - 1)

    def time(self, log_snr: Tensor | float) -> Tensor:
        low, high = self._ends
        return (torch.exp(-0.5 * _as_tensor(log_snr) / self.rho) - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class CosineSDE(SDE):
    """alpha = cos(theta), sigma = sin(theta), with theta linear in t between the angles of the two extreme log-SNRs.

    The cosine schedule of Nichol & Dhariwal 2021 in the truncated form of Hoogeboom et al. 2023 (appendix A of
    "simple diffusion"): at t = 0 the log-SNR is log_snr_max, at t = 1 it is log_snr_min, both finite.
    """

    log_snr_min: float = -15.0
    log_snr_max: float = 15.0
    t_min: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.log_snr_min) and math.isfinite(self.log_snr_max)):
            raise ValueError(f"log_snr_min and log_snr_max must be finite, got {self.log_snr_min}, {self.log_snr_max}.")
        if self.log_snr_min >= self.log_snr_max:
            raise ValueError(
                f"log_snr_min must be smaller than log_snr_max, got {self.log_snr_min}, {self.log_snr_max}."
            )
        _check_t_min(self.t_min)

    @property
    def _ends(self) -> tuple[float, float]:
        return math.atan(math.exp(-0.5 * self.log_snr_max)), math.atan(math.exp(-0.5 * self.log_snr_min))

    def _theta(self, t: Tensor | float) -> tuple[Tensor, float]:
        low, high = self._ends
        return low + self._time(t) * (high - low), high - low

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.cos(self._theta(t)[0])

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sin(self._theta(t)[0])

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        theta, speed = self._theta(t)
        return -speed * torch.sin(theta)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        theta, speed = self._theta(t)
        return speed * torch.cos(theta)

    def diffusion(self, t: Tensor | float) -> Tensor:
        theta, speed = self._theta(t)
        return torch.sqrt(2 * speed * torch.tan(theta))

    def time(self, log_snr: Tensor | float) -> Tensor:
        low, high = self._ends
        lam = _as_tensor(log_snr)
        return ((torch.atan(torch.exp(-0.5 * lam.double())) - low) / (high - low)).to(lam.dtype)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(SDE):
    """alpha = 1 - t, sigma = t (Liu et al. 2022, Lipman et al. 2023, seen as an SDE): f = -1/(1-t), g^2 = 2t/(1-t).

    f and g diverge at t = 1, where the probability flow stays finite; stochastic samplers therefore start at `t_max`,
    where the signal that the prior leaves out has scale 1 - t_max.
    """

    t_min: float = 1e-5
    t_max: float = 0.999

    def __post_init__(self) -> None:
        _check_t_min(self.t_min)
        if not self.t_min < self.t_max <= 1.0:
            raise ValueError(f"t_max must lie in (t_min, 1], got t_min={self.t_min}, t_max={self.t_max}.")

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - self._time(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return self._time(t).clone()

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return -torch.ones_like(self._time(t))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(self._time(t))

    def time(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(-0.5 * _as_tensor(log_snr))


SDES: dict[str, type[SDE]] = {c.__name__: c for c in (VPSDE, SubVPSDE, VESDE, CosineSDE, EDMSDE, RectifiedFlow)}
