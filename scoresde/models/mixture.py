r"""Mixtures of Gaussians: exact truth for everything the package computes.

Layer 2. If $x_0 \sim \sum_k w_k N(\mu_k, C_k)$ then $x_t = \alpha x_0 + \sigma\epsilon$ is again a mixture,
$p_t = \sum_k w_k N(\alpha\mu_k, \alpha^2 C_k + \sigma^2 I)$, and with responsibilities $r_k(x)$

$$\nabla\log p_t = -\sum_k r_k (\alpha^2 C_k + \sigma^2 I)^{-1}(x - \alpha\mu_k), \qquad
D = \sum_k r_k \left[\mu_k + \alpha C_k (\alpha^2 C_k + \sigma^2 I)^{-1} (x - \alpha\mu_k)\right].$$

Each covariance is diagonalised once, so any t costs two products with its eigenvectors. Everything is computed in
float64; scores and denoisers come back in the dtype of x, log densities (nats) in float64.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scoresde import checks
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource, Seed
from scoresde.sde import SDE, expand


class GaussianMixture:
    """sum_k weights_k N(means_k, covariances_k).

    Arguments: weights (K,), positive, summing to 1; means (K, d); covariances (K, d, d), symmetric positive definite;
    `event_shape`, the shape of one example when it is not (d,), for example (1, 8, 8) with d = 64.
    Raises `ValueError` for shapes that do not fit, weights that do not sum to 1, or a covariance that is not
    positive definite.
    """

    def __init__(self, weights: Any, means: Any, covariances: Any, *, event_shape: tuple[int, ...] | None = None):
        self.weights = _float64(weights)
        self.means = _float64(means)
        self.covariances = _float64(covariances)
        if self.means.dim() != 2 or self.means.numel() == 0:
            raise ValueError(f"means must have shape (K, d), got {tuple(self.means.shape)}.")
        k, d = self.means.shape
        checks.same_shape(self.weights, (k,), "weights")
        checks.same_shape(self.covariances, (k, d, d), "covariances")
        for name in ("weights", "means", "covariances"):
            checks.finite(getattr(self, name), name)
        if bool((self.weights <= 0).any()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError(f"weights must be positive and sum to 1, got {self.weights.tolist()}.")
        if not torch.allclose(self.covariances, self.covariances.mT, atol=1e-10, rtol=1e-8):
            raise ValueError("covariances must be symmetric.")
        self.event_shape = (d,) if event_shape is None else tuple(event_shape)
        if math.prod(self.event_shape) != d:
            raise ValueError(
                f"event_shape {self.event_shape} has {math.prod(self.event_shape)} entries, means have {d}."
            )
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.covariances)  # (K, d), (K, d, d) by columns
        # along the axes already: nothing to turn
        self.diagonal = bool((self.covariances == torch.diag_embed(self.covariances.diagonal(dim1=-2, dim2=-1))).all())
        if self.diagonal:
            self.eigenvalues = self.covariances.diagonal(dim1=-2, dim2=-1).clone()
            self.eigenvectors = torch.eye(d, dtype=torch.float64).expand(k, d, d).clone()
        if bool((self.eigenvalues <= 0).any()):
            raise ValueError(
                f"covariances must be positive definite, smallest eigenvalue {float(self.eigenvalues.min()):g}."
            )

    @classmethod
    def isotropic(cls, means: Any, std: float, weights: Any = None, **kwargs: Any) -> GaussianMixture:
        """Components of one standard deviation around means (K, d); equal weights unless given."""
        means, std = _float64(means), checks.positive(std, "std")
        if means.dim() != 2:
            raise ValueError(f"means must have shape (K, d), got {tuple(means.shape)}.")
        k, d = means.shape
        weights = torch.full((k,), 1 / k, dtype=torch.float64) if weights is None else weights
        return cls(weights, means, std**2 * torch.eye(d, dtype=torch.float64).expand(k, d, d), **kwargs)

    @property
    def mean(self) -> Tensor:
        """E[x], shape event_shape."""
        return (self.weights[:, None] * self.means).sum(0).reshape(self.event_shape)

    @property
    def covariance(self) -> Tensor:
        """Cov[x] of the flattened example, shape (d, d)."""
        centred = self.means - self.mean.flatten()
        spread = torch.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + spread

    def sample(
        self, n: int, *, seed: Seed = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """n exact draws, shape (n, *event_shape). One seed per sample is honoured as everywhere."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n must be an integer >= 0, got {n!r}.")
        source = RandomSource(seed, device, n)
        u = source.uniform((n, 1), torch.float64).squeeze(1)
        z = source.normal((n, self.means.shape[1]), torch.float64)
        k = torch.bucketize(u, self.weights.cumsum(0)[:-1].to(device), right=True)
        roots = self.eigenvectors * self.eigenvalues.sqrt()[:, None, :]
        x = self.means.to(device)[k] + torch.einsum("nij,nj->ni", roots.to(device)[k], z)
        return x.reshape(n, *self.event_shape).to(dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x (B, *event_shape) in nats, shape (B,), float64."""
        one = torch.ones((), dtype=torch.float64, device=checks.batch(x).device)
        return _log_prob(self, x, one, torch.zeros_like(one))

    def diffuse(self, sde: SDE) -> DiffusedMixture:
        """The exact `ScoreModel` of this mixture under `sde`."""
        return DiffusedMixture(self, sde)


class DiffusedMixture(ScoreModel):
    """Exact marginals of a diffused mixture, all in closed form. Has no trainable parameters."""

    event_shape: tuple[int, ...]
    weights: Tensor
    means: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(self, mixture: GaussianMixture, sde: SDE):
        super().__init__()
        self.mixture = mixture
        self.sde = sde
        self.diagonal = mixture.diagonal
        self.event_shape = mixture.event_shape
        self.sigma_data = math.sqrt(float(mixture.covariance.diagonal().mean()))
        self.data_mean = mixture.mean
        narrowest = math.sqrt(float(mixture.eigenvalues.min())) / self.sigma_data
        self.flow_scales = self.trace_scales = (min(max(0.7 * narrowest, 1e-3), 1.0), 1.0)
        self.flow_mismatch = 0.03  # the score is exact, but a rule of few points sees the ripples of a coarse curve
        for name in ("weights", "means", "eigenvalues", "eigenvectors"):
            self.register_buffer(name, getattr(mixture, name), persistent=False)

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """log p_t(x) in nats for x (B, *event_shape) and t () or (B,); shape (B,), float64."""
        t = self.time_of(t, x)
        return _log_prob(self, x, self.sde.alpha(t), self.sde.sigma(t))

    def terminal_log_prob(self, x: Tensor) -> Tensor:
        """log p_1(x), exact: unlike the SDE's prior it knows the trace of the data that is left at t = 1."""
        return self.log_prob(x, 1.0)

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        return cast("Tensor", self._answer(x, t, cond, mean=True)[0])

    def noise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        return -expand(self.sde.sigma(self.time_of(t, x)), x) * self.score(x, t, cond)

    def predict(self, x: Tensor, t: Tensor | float, cond: Any = None) -> tuple[Tensor, Tensor]:
        denoised, score = cast("tuple[Tensor, Tensor]", self._answer(x, t, cond, mean=True, score=True))
        return denoised, -expand(self.sde.sigma(self.time_of(t, x)), x) * score

    def score(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        return cast("Tensor", self._answer(x, t, cond, score=True)[1])

    def velocity(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        denoised, score = cast("tuple[Tensor, Tensor]", self._answer(x, t, cond, mean=True, score=True))
        t = self.time_of(t, x)
        return expand(self.sde.alpha_dot(t), x) * denoised - expand(self.sde.half_variance_rate(t), x) * score

    def _answer(
        self, x: Tensor, t: Tensor | float, cond: Any, *, mean: bool = False, score: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """(D, score), each where it is asked for, from one pass over the components."""
        if cond is not None:
            raise ValueError("a Gaussian mixture takes no condition; leave cond=None.")
        t = self.time_of(t, x)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        weight, whitened, _ = _components(self, x, alpha, sigma)
        denoised = slope = None
        if mean:
            pulled = _turned(self, weight[:, :, None] * (_rows(alpha) * self.eigenvalues.to(x.device) * whitened))
            denoised = (weight @ self.means.to(x.device) + pulled).reshape(x.shape).to(x.dtype)
        if score:
            slope = -_turned(self, weight[:, :, None] * whitened).reshape(x.shape).to(x.dtype)
        return denoised, slope


def _turned(mixture: GaussianMixture | DiffusedMixture, v: Tensor) -> Tensor:
    """sum_k Q_k v_k for v (B, K, d): back from the components' own axes, (B, d)."""
    if mixture.diagonal:
        return v.sum(1)
    return torch.einsum("kij,bkj->bi", mixture.eigenvectors.to(v.device), v)


def _rows(coefficient: Tensor) -> Tensor:
    """() or (B,) shaped to multiply (B, K, d)."""
    return coefficient.reshape(-1, 1, 1)


def _components(
    mixture: GaussianMixture | DiffusedMixture, x: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Responsibilities (B, K), Q_k^T (C_k(t))^{-1} (x - alpha mu_k) (B, K, d) and log densities (B,)."""
    if tuple(x.shape[1:]) != tuple(mixture.event_shape):
        raise ValueError(f"x must have shape (B, {', '.join(map(str, mixture.event_shape))}), got {tuple(x.shape)}.")
    values, vectors, means = (getattr(mixture, n).to(x.device) for n in ("eigenvalues", "eigenvectors", "means"))
    delta = x.double().flatten(1)[:, None, :] - _rows(alpha) * means
    rotated = delta if mixture.diagonal else torch.einsum("kij,bki->bkj", vectors, delta)
    variance = _rows(alpha) ** 2 * values + _rows(sigma) ** 2
    whitened = rotated / variance
    exponent = -0.5 * ((rotated * whitened).sum(-1) + variance.log().sum(-1) + means.shape[1] * math.log(2 * math.pi))
    joint = exponent + mixture.weights.to(x.device).log()
    return joint.softmax(1), whitened, joint.logsumexp(1)


def _log_prob(mixture: GaussianMixture | DiffusedMixture, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return _components(mixture, x, alpha, sigma)[2]


def _float64(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().double().cpu()
    return torch.from_numpy(np.array(value, dtype=np.float64))
