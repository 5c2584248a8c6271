"""Processes given by a rate beta(t): what VP, sub-VP and discrete schedules share, and the discrete ones."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch
from torch import Tensor

from scoresde.numerics import bisect
from scoresde.sde.base import SDE, as_tensor, check_t_min, safe_log


class BetaSDE(SDE):
    """f = -beta/2 and alpha = exp(-B/2), for `_beta(t)`, its integral B, `_integral(t)`, and that one's inverse."""

    def _beta(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _integral(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _integral_inverse(self, b: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(-0.5 * self._integral(as_tensor(t)))

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return self.drift_scale(t) * self.alpha(t)

    def drift_scale(self, t: Tensor | float) -> Tensor:
        return -0.5 * self._beta(as_tensor(t))

    @property
    def prior_std(self) -> float:
        return 1.0


class VariancePreserving(BetaSDE):
    """sigma^2 = 1 - alpha^2 and g = sqrt(beta)."""

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(as_tensor(t))))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return 0.5 * self._beta(as_tensor(t)) * self.alpha(t) ** 2 / self.sigma(t)

    def half_variance_rate(self, t: Tensor | float) -> Tensor:
        return 0.5 * self._beta(as_tensor(t)) * self.alpha(t) ** 2

    def diffusion(self, t: Tensor | float) -> Tensor:
        return self._beta(as_tensor(t)).sqrt()

    def log_snr(self, t: Tensor | float) -> Tensor:
        b = self._integral(as_tensor(t))
        return -b - safe_log(-torch.expm1(-b))

    def time(self, log_snr: Tensor | float) -> Tensor:
        target = as_tensor(log_snr)
        wide = -target.double()  # softplus written out: torch's own returns its argument above 20
        b = wide.clamp_min(0) + torch.log1p(torch.exp(-wide.abs()))
        return self._integral_inverse(b).to(target.dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class DiscreteVPSDE(VariancePreserving):
    r"""The process in continuous time through a schedule of N discrete steps (Ho et al. 2020), to run their networks.

    Step i = 0 ... N - 1 stands at t = i / (N - 1), where $\alpha^2 = \prod_{j \le i} (1 - \beta_j)$ exactly; between the
    steps B = -log alpha^2 is a monotone cubic (Fritsch & Carlson 1980), so that alpha, sigma and g have no jumps. The
    network's label is (N - 1) t. At t = 0 there is the noise of the first step, sigma = sqrt(beta_0), as the process has
    no less. Raises `ValueError` for fewer than two steps or a beta outside (0, 1): a schedule that ends in no signal at all
    has no log-SNR there.
    """

    betas: tuple[float, ...]
    t_min: float = 0.0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        except (TypeError, ValueError) as e:
            raise TypeError(f"betas must be a sequence of real numbers, got {type(self.betas).__name__}: {e}.") from e
        if len(self.betas) < 2 or not all(0.0 < b < 1.0 for b in self.betas):
            raise ValueError(
                f"betas must be at least two numbers in (0, 1), got {len(self.betas)} from {min(self.betas, default=None)} "
                f"to {max(self.betas, default=None)}."
            )
        if sum(-math.log1p(-b) for b in self.betas) > 46.0:
            raise ValueError(
                f"these {len(self.betas)} betas leave a signal of less than 1e-20 at the end; were they alphas_cumprod, or not "
                "of one schedule?"
            )
        check_t_min(self.t_min)

    def __repr__(self) -> str:
        return f"DiscreteVPSDE({len(self.betas)} betas from {self.betas[0]:.3g} to {self.betas[-1]:.3g})"

    @classmethod
    def linear(cls, beta_first: float = 1e-4, beta_last: float = 0.02, steps: int = 1000) -> DiscreteVPSDE:
        """Betas from first to last in equal steps, as DDPM has them."""
        return cls(tuple(np.linspace(beta_first, beta_last, steps).tolist()))

    @property
    def steps(self) -> int:
        """N."""
        return len(self.betas)

    def _knots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """B at the steps and its slope per step, (N,) each, float64; copied to each device once."""
        if device not in self._copies:
            b, slope = self._copies[torch.device("cpu")]
            self._copies[device] = b.to(device), slope.to(device)
        return self._copies[device]

    @functools.cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        b = -np.cumsum(np.log1p(-np.array(self.betas)))
        slope = np.gradient(b, edge_order=2 if len(b) > 2 else 1)
        step = np.diff(b)
        slope[1:-1] = np.minimum(slope[1:-1], 3 * np.minimum(step[1:], step[:-1]))
        slope[0], slope[-1] = np.clip(slope[0], 0, 3 * step[0]), np.clip(slope[-1], 0, 3 * step[-1])
        return {torch.device("cpu"): (torch.from_numpy(b), torch.from_numpy(slope))}

    def _cubic(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(u, c0, c1, c2, c3): B = c0 + c1 u + c2 u^2 + c3 u^3 on t's interval, u in [0, 1] from its left end."""
        b, slope = self._knots(t.device)
        left = (t.detach().double() * (self.steps - 1)).floor().clamp(0, self.steps - 2).long()
        u = t.double() * (self.steps - 1) - left
        b0, b1, m0, m1 = b[left], b[left + 1], slope[left], slope[left + 1]
        return u, b0, m0, 3 * (b1 - b0) - 2 * m0 - m1, 2 * (b0 - b1) + m0 + m1

    def _integral(self, t: Tensor) -> Tensor:
        u, c0, c1, c2, c3 = self._cubic(t)
        return (c0 + u * (c1 + u * (c2 + u * c3))).to(t.dtype)

    def _beta(self, t: Tensor) -> Tensor:
        u, _, c1, c2, c3 = self._cubic(t)
        return ((c1 + u * (2 * c2 + u * 3 * c3)) * (self.steps - 1)).to(t.dtype)

    def _integral_inverse(self, b: Tensor) -> Tensor:
        return bisect(self._integral, b)
