"""Small numerical tools that several rooms need. Layer 0."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def bisect(
    function: Callable[[Tensor], Tensor], target: Tensor, low: float | Tensor = 0.0, high: float | Tensor = 1.0
) -> Tensor:
    """The x in [low, high] at which an elementwise, nondecreasing `function` reaches `target`, by 54 halvings in float64.

    `target`, any shape, gives the result its shape and device; the ends are numbers or float64 tensors of that shape. The error
    is (high - low) 2^-55 or the spacing of doubles. A target beyond the function's values gives the nearest end.
    """
    goal = target.double()
    low, high = (e if isinstance(e, Tensor) else torch.full_like(goal, e) for e in (low, high))
    for _ in range(54):
        middle = (low + high) / 2
        below = function(middle) < goal
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@functools.cache
def legendre(points: int) -> tuple[Array, Array]:
    """Nodes and weights (points,) of the Gauss-Legendre rule on [-1, 1]: exact for polynomials of degree 2 points - 1."""
    return np.polynomial.legendre.leggauss(points)


def lagrange(knots: Array, at: Array) -> Array:
    """The Lagrange polynomials of `knots` (k, *) at the points `at` (*), (k, *): polynomial j is 1 at knot j, 0 at the others.

    The trailing axes of the two are broadcast against each other.
    """
    values: Array | float = 1.0
    for i, knot in enumerate(knots):
        gaps = knots - knot
        gaps[i] = 1.0
        factors = (at - knot) / gaps
        factors[i] = 1.0
        values = values * factors
    return cast(Array, values)


def lagrange_integrals(knots: Array, at: Array, mass: Array) -> Array:
    """Integrals (k, *) of the Lagrange polynomials of `knots` (k, *) by a rule with points `at` (*, Q) and weights `mass` (*, Q).

    What a multistep method weighs its slopes with: the polynomial through them, integrated. The knots may be in a variable other
    than that of integration; `at` are then the points of the rule in the knots' variable.
    """
    return (lagrange(knots[..., None], at) * mass).sum(-1)
