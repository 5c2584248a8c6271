r"""The trajectory of the probability flow as a curve that can be read anywhere, from forward evaluations alone.

Layer 3. On the angle path (`scoresde.flow`), $du/d\theta = f(u, \theta)$ is sampled at n nodes, equally spaced in

$$s(\theta) = \mathrm{asinh}\frac{\tan(\theta/2)}{a} - \mathrm{asinh}\frac{\tan((\pi/2 - \theta)/2)}{b},$$

which resolves angles down to a at the data's end and b at the noise's, and is smooth in between. An Adams method in s, its
order growing from 1 and with one evaluation per node (predict, evaluate, correct), visits the nodes; the first few are
visited again once their slopes are known, because a start of low order would be felt to the end. The slopes, interpolated by
polynomials of the next nodes, then give the curve U(s) and its derivative at any s: two fixed matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoresde import checks
from scoresde.flow import AnglePath, rotated_velocity
from scoresde.models.base import ScoreModel
from scoresde.models.network import ScoreNet
from scoresde.models.prepared import PreparedNet
from scoresde.numerics import Array, bisect, lagrange, lagrange_integrals, legendre

ORDER = 4  # of the Adams method
DENSE = 5  # degree of the polynomials that interpolate the slopes


@dataclass(frozen=True)
class AngleWarp:
    """The variable s(theta) with resolutions `a` and `b` (radians) at the ends theta = 0 and pi/2."""

    a: float
    b: float

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            checks.positive(getattr(self, name), name)

    def __call__(self, theta: Array) -> Array:
        """s(theta), increasing."""
        return np.arcsinh(np.tan(theta / 2) / self.a) - np.arcsinh(np.tan((np.pi / 2 - theta) / 2) / self.b)

    def slope(self, theta: Array) -> Array:
        """ds/dtheta."""
        x, y = np.tan(theta / 2), np.tan((np.pi / 2 - theta) / 2)
        return 0.5 * (1 + x * x) / np.hypot(self.a, x) + 0.5 * (1 + y * y) / np.hypot(self.b, y)

    def inverse(self, s: Array, low: float, high: float) -> Array:
        """theta(s) within [low, high], by bisection to the last digit."""
        return bisect(lambda theta: torch.from_numpy(self(theta.numpy())), torch.from_numpy(s), low, high).numpy()


@dataclass(frozen=True)
class QuadratureRule:
    """Angles theta (N,) between the ends of a solve, with the weights dtheta that a sum over them takes."""

    theta: Array
    weights: Array


@functools.lru_cache(maxsize=64)
def equispaced(warp: AngleWarp, low: float, high: float, n: int) -> tuple[Array, float]:
    """n angles equally spaced in s from low to high, and their spacing."""
    ends = warp(np.array([low, high]))
    theta = warp.inverse(np.linspace(ends[0], ends[1], n), low, high)
    theta[0], theta[-1] = low, high
    return theta, float(ends[1] - ends[0]) / (n - 1)


@functools.lru_cache(maxsize=256)
def gauss_legendre(warp: AngleWarp, low: float, high: float, points: int) -> QuadratureRule:
    """Nodes and weights (for d theta) of the Gauss-Legendre rule in s."""
    ends = warp(np.array([low, high]))
    z, w = np.polynomial.legendre.leggauss(points)
    half = 0.5 * float(ends[1] - ends[0])
    theta = warp.inverse(half * (z + 1) + ends[0], low, high)
    return QuadratureRule(theta, half * w / warp.slope(theta))


class Field:
    """f = du/dtheta of a model at known angles, the same for all examples of a batch u (B, *).

    For a plain network f = P u + R F with its raw output F(S u): `moving` is F alone, so that a trace has to be taken of
    nothing else. Other models give f itself (P = 0, R = 1).
    """

    def __init__(
        self, model: ScoreModel, path: AnglePath, u: Tensor, theta: Array, ends: tuple[float, float], cond: Any
    ):
        self.model, self.path, self.ends, self.cond = model, path, ends, cond
        angles = torch.from_numpy(np.ascontiguousarray(theta))
        times = path.time(angles, *ends)
        self.times = times.tolist()
        self.angles = angles.to(u.device)
        prepared = model.prepare(u, times)
        plain = isinstance(prepared, PreparedNet) and type(model).predict is ScoreNet.predict
        self.prepared = prepared if plain else None
        self.p, self.r, self.scale = [0.0] * len(theta), [1.0] * len(theta), [1.0] * len(theta)
        if self.prepared is not None:
            a, b, c, e = self.prepared.affine(times)
            cosine, sine_over_c, scale = torch.cos(angles), torch.sin(angles) / path.c, path.scale(times)
            self.p = (scale * rotated_velocity(cosine, sine_over_c, a, c)).tolist()
            self.r = rotated_velocity(cosine, sine_over_c, b, e).tolist()
            self.scale = scale.tolist()

    def moving(self, u: Tensor, j: int) -> Tensor:
        """The part of f at node j that is not linear in u."""
        if self.prepared is not None:
            return self.prepared.output(u * self.scale[j], self.times[j], self.cond)
        return self.path.velocity(self.model, u, self.angles[j].expand(u.shape[0]), self.ends, self.cond)

    def __call__(self, u: Tensor, j: int) -> Tensor:
        """f(u, theta_j), one evaluation of the model."""
        return self.whole(u, self.moving(u, j), j)

    def whole(self, u: Tensor, moving: Tensor, j: int) -> Tensor:
        """f from its moving part."""
        return moving if self.prepared is None else u * self.p[j] + moving * self.r[j]


@dataclass
class Curve:
    """Slopes dU/dnode (n, B, *) at the nodes of `warp`, from u (B, *) at angle `low` to `high`."""

    warp: AngleWarp
    low: float
    high: float
    u: Tensor
    slopes: Tensor

    def at(self, theta: Array) -> tuple[Tensor, Tensor]:
        """Matrices (N, n) that give U - u and dU/dtheta at the angles when multiplied with the slopes."""
        n = self.slopes.shape[0]
        _, spacing = equispaced(self.warp, self.low, self.high, n)
        position = (self.warp(theta) - float(self.warp(np.array([self.low]))[0])) / spacing
        value, slope = dense(n, DENSE, tuple(position.tolist()))
        rate = self.warp.slope(theta) / spacing
        return self._matrix(value), self._matrix(slope * rate[:, None])

    def _matrix(self, m: Array) -> Tensor:
        return torch.from_numpy(m).to(self.u.device, self.u.dtype)

    @property
    def end(self) -> Tensor:
        """U at `high`."""
        n = self.slopes.shape[0]
        return self.u + torch.tensordot(self._matrix(dense(n, DENSE, (n - 1.0,))[0])[0], self.slopes, 1)


def trace_curve(field: Field, warp: AngleWarp, u: Tensor, theta: Array, spacing: float) -> Curve:
    """Follow the flow from u (B, *) through the angles theta (n,), equally spaced in s: `evaluations(n)` in all."""
    rates = (spacing / warp.slope(theta)).tolist()
    slopes = [field(u, 0) * rates[0]]
    state = u
    for i in range(1, len(theta)):
        if i == ORDER:  # the first steps were of low order: all their slopes together place their nodes better
            weights = _integrals(np.arange(ORDER)[:, None], np.arange(ORDER)).T.tolist()
            slopes[1:] = [field(_add(u, slopes, weights[k]), k) * rates[k] for k in range(1, ORDER)]
            state = _add(u, slopes, weights[-1])
        order = min(i, ORDER)
        guess = _add(state, slopes[-order:], _adams(order, 0))
        slopes.append(field(guess, i) * rates[i])
        state = _add(state, slopes[-order:], _adams(order, 1))
    return Curve(warp, float(theta[0]), float(theta[-1]), u, torch.stack(slopes))


def evaluations(nodes: int) -> int:
    """How many evaluations `trace_curve` takes."""
    return nodes + (ORDER - 1 if nodes > ORDER else 0)


def _add(state: Tensor, slopes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    for slope, w in zip(slopes, weights, strict=True):
        state = torch.add(state, slope, alpha=w)
    return state


@functools.lru_cache(maxsize=64)
def _adams(order: int, implicit: int) -> tuple[float, ...]:
    """Weights of the last `order` slopes in a unit step: Bashforth (the last node begins the step) or Moulton (it ends it)."""
    nodes = np.arange(implicit - order + 1, implicit + 1)
    return tuple(_integrals(nodes[:, None], np.ones(1))[:, 0].tolist())


def _integrals(nodes: NDArray[Any], to: NDArray[Any]) -> Array:
    """Integrals (k, N) from 0 to `to` (N,) of the Lagrange polynomials of `nodes` (k, N)."""
    at, weights = legendre(DENSE)  # exact for polynomials of degree 2 DENSE - 1
    half = 0.5 * to[:, None]
    return lagrange_integrals(np.asarray(nodes, np.float64), half * (1 + at), half * weights)


@functools.lru_cache(maxsize=256)
def dense(n: int, degree: int, at: tuple[float, ...]) -> tuple[Array, Array]:
    """Matrices (N, n): the integral from node 0 to each position, and the value there, of the interpolated slopes.

    Between two nodes the polynomial of `degree` through the nearest degree + 1 nodes is taken; positions count nodes.
    """
    width = min(degree + 1, n)

    def stencil(left: NDArray[np.integer[Any]]) -> tuple[NDArray[np.integer[Any]], Array]:
        """(which nodes (width, N), where they are seen from the node `left` (N,))"""
        chosen = np.clip(left - (width - 1) // 2, 0, n - width) + np.arange(width)[:, None]
        return chosen, (chosen - left).astype(np.float64)

    intervals = np.arange(n - 1)
    chosen, nodes = stencil(intervals)
    steps = np.zeros((n - 1, n))
    steps[intervals, chosen] = _integrals(nodes, np.ones(n - 1))
    whole = np.concatenate([np.zeros((1, n)), np.cumsum(steps, 0)])  # integrals from node 0 to each node
    position = np.array(at)
    left = np.clip(np.floor(position), 0, n - 2).astype(int)
    chosen, nodes = stencil(left)
    k = np.arange(len(at))
    integral, value = whole[left], np.zeros((len(at), n))
    integral[k, chosen] += _integrals(nodes, position - left)
    value[k, chosen] = lagrange(nodes, position - left)
    return integral, value
