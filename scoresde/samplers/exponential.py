r"""The coefficients of every exponential integrator: one formula, integrated numerically in float64.

Layer 3. With $y = x/\alpha$ and $r = \sigma/\alpha$ the probability flow is $dy/dr = \hat\epsilon$, and a step from t to s is

$$x_s = A\,x_t + G\int_t^s m\,dM + C\,z,$$

where m is what the network is asked for and M the variable that it multiplies:

| prediction | m | M | A | G |
|---|---|---|---|---|
| `Noise` | $\hat\epsilon$ | $r$ | $\alpha_s/\alpha_t$ | $\alpha_s$ |
| `Data` | $D$ | $1/\varphi(r)$ | $\alpha_s\varphi_s/(\alpha_t\varphi_t)$ | $\alpha_s\varphi_s$ |
| `Angle` | $\cos\theta\,\hat\epsilon - \sin\theta\,D/c$ | $\theta = \arctan(r/c)$ | $S_s/S_t$ | $S_s$ |

$S = \sqrt{\alpha^2c^2 + \sigma^2}$ with the data's scale c. The function $\varphi$ chooses one of the SDEs with the same
marginals: $\varphi = r$ is the probability flow (C = 0); $\varphi = r^{1+\tau^2}$ has $\tau$ times the noise of the reverse SDE
(Xue et al. 2023, SA-Solver, proposition 4.2); any other increasing $\varphi/r$ is an ER-SDE (Cui et al. 2023, equation 14). Its
noise is $C = \alpha_s\sqrt{r_s^2 - r_t^2\varphi_s^2/\varphi_t^2}$.

A multistep method replaces m by the polynomial through the latest predictions, in some variable (log-SNR, r, t, theta),
and integrates that. So a method is (prediction, variable, nodes), and what the literature derives for each by hand is
one integral: $w_j = G\int \ell_j\,dM$ with the Lagrange polynomial of node j, by Gauss-Legendre quadrature in log r.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde import checks
from scoresde.flow import rotated_velocity, rotation
from scoresde.numerics import Array, lagrange_integrals, legendre
from scoresde.sde import SDE

QUADRATURE = 48  # points of the quadrature in each step
VARIABLES = ("log-snr", "ratio", "time", "angle")
REACH = 40.0  # a step to sigma = 0 is integrated over this many units of log r: exp(-40) is below rounding


class Points(NamedTuple):
    """Times with what the schedule says there, float64 arrays (N,) on the host: small, and NumPy is quick on small arrays."""

    t: Array
    alpha: Array
    sigma: Array
    log_r: Array  # log(sigma/alpha)

    @classmethod
    def of(cls, sde: SDE, times: Tensor) -> Points:
        log_r = -0.5 * sde.log_snr(times)
        return cls(*(v.numpy() for v in (times, sde.alpha(times), sde.sigma(times), log_r)))

    def __getitem__(self, index: slice) -> Points:  # type: ignore[override]
        return Points(*(v[index] for v in tuple(self)))


class Tau:
    """Noise of tau times the reverse SDE's for low < r < high: log phi = log r + tau^2 clip(log r, log low, log high)."""

    def __init__(self, tau: float = 1.0, low: float = 0.0, high: float = math.inf):
        if not (math.isfinite(tau) and tau >= 0):
            raise ValueError(
                f"tau must be a finite number >= 0, got {tau}; 0 is the probability flow, 1 the reverse SDE."
            )
        if not 0 <= low < high:
            raise ValueError(f"tau acts for low < sigma/alpha < high with 0 <= low < high, got {low} and {high}.")
        self.tau, self.low, self.high = float(tau), float(low), float(high)
        self.noisy = tau > 0

    def excess(self, log_r: Array) -> Array:
        """log(phi / r), 0 for the probability flow."""
        low = math.log(self.low) if self.low else -math.inf
        return self.tau**2 * np.clip(log_r, low, math.log(self.high))

    def slope(self, log_r: Array) -> Array:
        """d log(phi / r) / d log r."""
        r = np.exp(log_r)
        return self.tau**2 * ((r > self.low) & (r < self.high)).astype(np.float64)


class ErSde:
    """phi = r (exp(r^0.3) + 10), the choice that Cui et al. 2023 found best (their ER-SDE 5)."""

    noisy = True

    def excess(self, log_r: Array) -> Array:
        """log(phi / r)."""
        power = np.exp(0.3 * log_r)
        return power + np.log1p(10 * np.exp(-power))

    def slope(self, log_r: Array) -> Array:
        """d log(phi / r) / d log r."""
        power = np.exp(0.3 * log_r)
        return 0.3 * power / (1 + 10 * np.exp(-power))


class Prediction(ABC):
    """What is interpolated. `combination` says how it follows from the model's raw output, the rest is the table above.

    `noisy`: whether steps draw noise (C > 0). `centred`: whether m depends on where the data's mean is, which then has to be taken
    out (`mean_part`, `centre`); noise and data do not.
    """

    noisy: bool = False
    centred: ClassVar[bool] = False

    @abstractmethod
    def combination(self, affine: Sequence[Array], at: Points) -> tuple[Array, Array]:
        """(p, q) with m = p x + q F, from the model's (a, b, c, e) at the same times."""

    def mean_part(self, at: Points) -> Array:
        """What one unit of the data's mean adds to m, of a centred prediction."""
        raise NotImplementedError

    def centre(self, affine: Sequence[Array], at: Points) -> tuple[Array, Array]:
        """(a, b) with a x + b F the data's mean, of a centred prediction."""
        raise NotImplementedError

    @abstractmethod
    def ends(self, t: Points, s: Points) -> tuple[Array, Array, Array, Array]:
        """(A, G, M_s - M_t, C) for steps from t to s, with any factor common to M and 1/G moved to G."""

    @abstractmethod
    def density(self, log_r: Array, end: Array) -> Array:
        """dM / d log r at log_r (N, Q), in the units of `ends`, for steps that end at log r = end (N, 1)."""


@dataclass(frozen=True)
class Noise(Prediction):
    """m = eps_hat, M = r: DPM-Solver, DEIS, iPNDM, LMS, exponential Adams-Bashforth in noise prediction."""

    def combination(self, affine: Sequence[Array], at: Points) -> tuple[Array, Array]:
        return affine[2], affine[3]

    def ends(self, t: Points, s: Points) -> tuple[Array, Array, Array, Array]:
        return s.alpha / t.alpha, s.alpha, s.sigma / s.alpha - t.sigma / t.alpha, np.zeros_like(t.t)

    def density(self, log_r: Array, end: Array) -> Array:
        return np.exp(log_r)


class Data(Prediction):
    """m = D, M = 1/phi: DPM-Solver++, UniPC, and with noise SDE-DPM-Solver++, SA-Solver, ER-SDE."""

    def __init__(self, phi: Tau | ErSde | None = None):
        if not (phi is None or (hasattr(phi, "excess") and hasattr(phi, "slope"))):
            raise TypeError(f"phi must be Tau(...) or ErSde(), got {phi!r}; for tau = 0.5 write Data(Tau(0.5)).")
        self.phi = Tau(0.0) if phi is None else phi
        self.noisy = self.phi.noisy

    def combination(self, affine: Sequence[Array], at: Points) -> tuple[Array, Array]:
        return affine[0], affine[1]

    def ends(self, t: Points, s: Points) -> tuple[Array, Array, Array, Array]:
        excess = self.phi.excess(s.log_r) - self.phi.excess(t.log_r)  # exactly 0 where there is no noise
        log_keep = s.log_r - t.log_r + excess
        noise = np.sqrt(-np.expm1(2 * excess))
        return s.alpha / t.alpha * np.exp(log_keep), s.alpha, -np.expm1(log_keep), s.sigma * noise

    def density(self, log_r: Array, end: Array) -> Array:
        return -(1 + self.phi.slope(log_r)) * np.exp(end - log_r + self.phi.excess(end) - self.phi.excess(log_r))


@dataclass(frozen=True)
class Angle(Prediction):
    """m = the velocity du/dtheta of `scoresde.flow`, M = theta: exact for Gaussian data of standard deviation c."""

    c: float = 1.0
    centred: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.positive(self.c, "c")

    def combination(self, affine: Sequence[Array], at: Points) -> tuple[Array, Array]:
        a, b, c, e = affine
        theta, _ = rotation(at.alpha, at.sigma, self.c)
        cosine, sine_over_c = np.cos(theta), np.sin(theta) / self.c
        return rotated_velocity(cosine, sine_over_c, a, c), rotated_velocity(cosine, sine_over_c, b, e)

    def mean_part(self, at: Points) -> Array:
        """sin(theta)/c, what one unit of the data's mean adds to m: with it taken out, m = cos eps_hat - sin (D - mean)/c."""
        _, scale = rotation(at.alpha, at.sigma, self.c)
        return at.sigma / scale / self.c

    def centre(self, affine: Sequence[Array], at: Points) -> tuple[Array, Array]:
        """(a, b) with mu = a x + b F: the mean of Gaussian data N(mu, c^2 I) whose denoiser has the value that was found.

        D = mu + k (x/alpha - mu), k = alpha^2 c^2 / (alpha^2 c^2 + sigma^2), so that m = 0 for the centred data. At high noise
        k vanishes, D is the mean of any data, and so is mu.
        """
        k = (at.alpha * self.c) ** 2 / ((at.alpha * self.c) ** 2 + at.sigma**2)
        return (affine[0] - k / at.alpha) / (1 - k), affine[1] / (1 - k)

    def ends(self, t: Points, s: Points) -> tuple[Array, Array, Array, Array]:
        theta_t, scale_t = rotation(t.alpha, t.sigma, self.c)
        theta_s, scale_s = rotation(s.alpha, s.sigma, self.c)
        return scale_s / scale_t, scale_s, theta_s - theta_t, np.zeros_like(t.t)

    def density(self, log_r: Array, end: Array) -> Array:
        return 0.5 / np.cosh(log_r - math.log(self.c))


def step_weights(
    prediction: Prediction,
    sde: SDE,
    t: Points,
    s: Points,
    nodes: Sequence[Points],
    variable: str = "log-snr",
    *,
    midpoint: bool = False,
) -> Array:
    """Weights w (k, N) of the predictions at k `nodes`, for N steps from t to s.

    With `midpoint` the polynomial is not integrated but evaluated at the middle of the step in log-SNR, as DPM-Solver++
    (2M) and UniPC's two-node formulas do: the same order, other constants. A step to sigma = 0 by data
    prediction takes the first node alone, since no polynomial in log-SNR says anything of its infinite end.
    """
    _, gain, total, _ = prediction.ends(t, s)
    total = gain * total
    if len(nodes) == 1:
        return total[None]
    start, end = t.log_r[:, None], s.log_r[:, None]
    half = 0.5 * (np.maximum(end, start - REACH) - start)
    if midpoint:
        points, mass = start + half, np.ones_like(half)
    else:
        at, weights = legendre(QUADRATURE)
        points = start + half * (1 + at)
        mass = weights * prediction.density(points, end)
    at = _coordinate(sde, points, variable, prediction)
    if variable == "time":
        knots = [node.t for node in nodes]
    else:
        knots = [_coordinate(sde, node.log_r, variable, prediction) for node in nodes]
    weights = lagrange_integrals(np.stack(knots), at, mass)
    weights = weights * (total / weights.sum(0))  # their sum is the integral of dM, known exactly
    if isinstance(prediction, Data) and not s.sigma.all():
        weights = np.where(s.sigma == 0, total * np.eye(len(nodes), 1), weights)
    return weights


def _coordinate(sde: SDE, log_r: Array, variable: str, prediction: Prediction) -> Array:
    """The interpolation variable at log r."""
    if variable == "log-snr":
        return log_r
    if variable == "ratio":
        return np.exp(log_r)
    if variable == "time":
        return sde.time(torch.from_numpy(-2 * log_r)).numpy()
    return rotation(1.0, np.exp(log_r), getattr(prediction, "c", 1.0))[0]


def affine_arrays(model: object, times: Tensor) -> list[Array]:
    """The model's (a, b, c, e) at float64 times as arrays."""
    return [v.numpy() for v in model.affine(times)]  # type: ignore[attr-defined]


def prediction_for(name: str | Prediction, sigma_data: float) -> Prediction:
    """The object behind "noise", "data" or "angle" (with c = sigma_data), or the given object."""
    if isinstance(name, Prediction):
        return name
    kinds = {"noise": Noise, "data": Data, "angle": Angle}
    kind = kinds[checks.choice(name, kinds, "prediction")]
    return kind(sigma_data) if name == "angle" else kind()
