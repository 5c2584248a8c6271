"""The processes by name: six schedules that are closed forms of time. See `scoresde.sde.base` for what they share."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from scoresde import checks
from scoresde.sde.base import SDE, as_tensor, check_t_min, safe_log
from scoresde.sde.beta import BetaSDE, VariancePreserving


@dataclasses.dataclass(frozen=True)
class _LinearBeta(BetaSDE):
    """What VP and sub-VP share: beta(t) = beta_min + t (beta_max - beta_min)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        checks.ordered(self.beta_min, self.beta_max, "beta_min", "beta_max")
        check_t_min(self.t_min)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _integral_inverse(self, b: Tensor) -> Tensor:
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b).sqrt()
        return 2 * b / (self.beta_min + root)  # the form of the quadratic formula that does not cancel


@dataclasses.dataclass(frozen=True)
class VPSDE(VariancePreserving, _LinearBeta):
    """Variance preserving (Song et al. 2021, equations 11 and 32): f = -beta/2, g = sqrt(beta), alpha^2 + sigma^2 = 1."""


@dataclasses.dataclass(frozen=True)
class SubVPSDE(_LinearBeta):
    """Sub-variance-preserving (Song et al. 2021, equations 12 and 29): sigma = 1 - exp(-B), g^2 = beta (1 - exp(-2B))."""

    def sigma(self, t: Tensor | float) -> Tensor:
        return -torch.expm1(-self._integral(as_tensor(t)))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return self._beta(as_tensor(t)) * self.alpha(t) ** 2

    def diffusion(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-self._beta(as_tensor(t)) * torch.expm1(-2 * self._integral(as_tensor(t))))

    def log_snr(self, t: Tensor | float) -> Tensor:
        b = self._integral(as_tensor(t))
        return -b - 2 * safe_log(-torch.expm1(-b))

    def time(self, log_snr: Tensor | float) -> Tensor:
        # r = alpha / (1 - alpha^2) solved for alpha, in the form that is exact on either side of r = 1
        target = as_tensor(log_snr)
        r = torch.exp(0.5 * target.double())
        sigma = 2 / (1 + torch.sqrt(1 + 4 * r * r))
        b = torch.where(r < 1, -2 * safe_log(r * sigma), -torch.log1p(-sigma.clamp_max(0.9)))
        return self._integral_inverse(b).to(target.dtype)


class _VarianceExploding(SDE):
    """alpha = 1: the noise is added to data that keep their scale."""

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_tensor(t))

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_tensor(t))


@dataclasses.dataclass(frozen=True)
class VESDE(_VarianceExploding):
    """Variance exploding (Song et al. 2021, equations 9 and 30): sigma = sigma_min (sigma_max / sigma_min)^t."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        checks.ordered(self.sigma_min, self.sigma_max, "sigma_min", "sigma_max")
        check_t_min(self.t_min)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Tensor | float) -> Tensor:
        return self.sigma_min * torch.exp(as_tensor(t) * self._log_ratio)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return self.sigma(t) * self._log_ratio

    def diffusion(self, t: Tensor | float) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._log_ratio)

    def time(self, log_snr: Tensor | float) -> Tensor:
        return (-0.5 * as_tensor(log_snr) - math.log(self.sigma_min)) / self._log_ratio


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
        check_t_min(self.t_min)

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def sigma(self, t: Tensor | float) -> Tensor:
        low, high = self._ends
        return (low + as_tensor(t) * (high - low)) ** self.rho

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        low, high = self._ends
        return self.rho * (high - low) * (low + as_tensor(t) * (high - low)) ** (self.rho - 1)

    def time(self, log_snr: Tensor | float) -> Tensor:
        low, high = self._ends
        return (torch.exp(-0.5 * as_tensor(log_snr) / self.rho) - low) / (high - low)


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
        if checks.number(self.log_snr_min, "log_snr_min") >= checks.number(self.log_snr_max, "log_snr_max"):
            raise ValueError(
                f"log_snr_min must be smaller than log_snr_max, got {self.log_snr_min}, {self.log_snr_max}."
            )
        check_t_min(self.t_min)

    @property
    def _ends(self) -> tuple[float, float]:
        return math.atan(math.exp(-0.5 * self.log_snr_max)), math.atan(math.exp(-0.5 * self.log_snr_min))

    def _theta(self, t: Tensor | float) -> tuple[Tensor, float]:
        low, high = self._ends
        return low + as_tensor(t) * (high - low), high - low

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
        target = as_tensor(log_snr)
        return ((torch.atan(torch.exp(-0.5 * target.double())) - low) / (high - low)).to(target.dtype)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(SDE):
    """alpha = 1 - t, sigma = t (Liu et al. 2022, Lipman et al. 2023, seen as an SDE): f = -1/(1-t), g^2 = 2t/(1-t).

    f and g diverge at t = 1, where the probability flow stays finite; stochastic samplers therefore start at `t_max`,
    where the signal that the prior leaves out has scale 1 - t_max.
    """

    t_min: float = 1e-5
    t_max: float = 0.999

    def __post_init__(self) -> None:
        check_t_min(self.t_min)
        if not self.t_min < checks.number(self.t_max, "t_max") <= 1.0:
            raise ValueError(f"t_max must lie in (t_min, 1], got t_min={self.t_min}, t_max={self.t_max}.")

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - as_tensor(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_tensor(t)

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return -torch.ones_like(as_tensor(t))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_tensor(t))

    def time(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(-0.5 * as_tensor(log_snr))
