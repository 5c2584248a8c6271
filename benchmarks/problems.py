"""Exact mixtures for the accuracy tables: name -> (weights (K,), means (K, d), covariances (K, d, d)), NumPy float64."""

from __future__ import annotations

import numpy as np

Mixture = tuple[np.ndarray, np.ndarray, np.ndarray]


def _isotropic(means: np.ndarray, std: float) -> Mixture:
    k, d = means.shape
    return np.full(k, 1 / k), means, np.broadcast_to(std**2 * np.eye(d), (k, d, d)).copy()


def ring8() -> Mixture:
    """Eight narrow components on the unit circle."""
    a = 2 * np.pi * np.arange(8) / 8
    return _isotropic(np.stack([np.cos(a), np.sin(a)], 1), 0.07)


def grid25() -> Mixture:
    """Five by five narrower ones."""
    p = 0.7 * np.arange(-2, 3)
    return _isotropic(np.array([(x, y) for x in p for y in p]), 0.05)


def moons() -> Mixture:
    """Two interleaved half circles of 16 components each."""
    t = np.linspace(0, np.pi, 16)
    means = np.concatenate([np.stack([np.cos(t), np.sin(t)], 1), np.stack([1 - np.cos(t), 0.5 - np.sin(t)], 1)])
    return _isotropic(means - means.mean(0), 0.07)


def gmm64() -> Mixture:
    """Ten components of full covariance in 64 dimensions, standard deviations from 0.05 to 1."""
    r = np.random.default_rng(7)
    k, d = 10, 64
    means = 0.7 * r.normal(size=(k, d))
    covariances = []
    for _ in range(k):
        q, _ = np.linalg.qr(r.normal(size=(d, d)))
        covariances.append(q @ np.diag(np.exp(r.uniform(np.log(0.003), 0.0, size=d))) @ q.T)
    return r.dirichlet(5 * np.ones(k)), means, np.array(covariances)


PROBLEMS = {"ring8": ring8, "grid25": grid25, "moons": moons, "gmm64": gmm64}
