r"""Latents: data to the prior's space and back along the probability flow, and ways between two examples. Layer 3.

The probability-flow ODE is a bijection between data at t_min and latents at t = 1 (Song et al. 2021, section 4.3).
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from scoresde import checks, conditions
from scoresde.flow import solve_flow
from scoresde.models.base import ScoreModel, check_input
from scoresde.modes import evaluating
from scoresde.samplers.setup import MAX_STEPS
from scoresde.sde import expand


def encode(model: ScoreModel, x: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5, cond: Any = None) -> Tensor:
    """The latent at t = 1 of data x (B, *), by the probability flow; `decode` inverts it up to the tolerances."""
    check_input(model, x, cond)
    return _flow(model, x, model.sde.t_min, 1.0, rtol, atol, cond)


def decode(model: ScoreModel, z: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5, cond: Any = None) -> Tensor:
    """The data at t_min of a latent z (B, *) at t = 1, by the probability flow."""
    check_input(model, z, cond, "z")
    return _flow(model, z, 1.0, model.sde.t_min, rtol, atol, cond)


def round_trip(
    model: ScoreModel, x: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5, cond: Any = None
) -> tuple[Tensor, Tensor]:
    """(z, error): the latents of x (B, *), and per example (B,) the root mean square over entries of decode(z) - x.

    How far the two solves are from inverting each other, in the data's units: what a likelihood's latents, interpolations and
    edits can be trusted to. Near a boundary between modes it can be large although both solves keep their tolerance.
    """
    z = encode(model, x, rtol=rtol, atol=atol, cond=cond)
    back = decode(model, z, rtol=rtol, atol=atol, cond=cond)
    return z, (back - x).double().flatten(1).square().mean(1).sqrt()


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    r"""Spherical interpolation of each example: $[\sin((1-w)\omega)\,a + \sin(w\omega)\,b]/\sin\omega$.

    a, b (B, *); omega is the angle between the two (over all of an example's entries), `weight` w a number or (B,).
    Latents of a Gaussian prior lie near a sphere, and so does every point of this path, where a straight line would pass
    through norms that the prior does not know. Parallel examples are joined by the straight line; opposite ones
    have no shortest arc, and an error says so (`ValueError`).
    """
    checks.same_shape(checks.batch(b, "b"), checks.batch(a, "a").shape, "b")
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    norms = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    cosine = ((flat_a * flat_b).sum(1) / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)
    opposite = (cosine < -1 + 1e-12).nonzero().flatten().tolist()
    if opposite:
        raise ValueError(f"rows {checks.rows_text(opposite)} are opposite: no arc between them is the shortest.")
    omega = torch.acos(cosine)
    w = _real(weight, "weight").to(a.device)
    if not bool(torch.isfinite(w).all()):
        raise ValueError(f"weight must be finite, got {w.tolist()}.")
    if w.dim() and w.shape != omega.shape:
        raise ValueError(f"weight must be a number or have shape ({len(a)},), got {tuple(w.shape)}.")
    flat = omega < 1e-6
    sine = torch.where(flat, 1.0, omega.sin())
    w = w.expand(omega.shape)
    first = torch.where(flat, 1 - w, ((1 - w) * omega).sin() / sine)
    second = torch.where(flat, w, (w * omega).sin() / sine)
    return expand(first, a) * a + expand(second, b) * b


def interpolate(
    model: ScoreModel,
    x0: Tensor,
    x1: Tensor,
    weights: Sequence[float] | int = 8,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    cond: Any = None,
) -> Tensor:
    """Ways between data x0 and x1, both (B, *): encode, `slerp` the latents, decode. Returns (W, B, *).

    `weights`: numbers in [0, 1] (0 gives x0 again, 1 gives x1, up to the tolerances), or how many equally spaced.
    """
    check_input(model, x0, cond, "x0")
    checks.same_shape(checks.batch(x1, "x1"), x0.shape, "x1")
    checks.finite(x1, "x1")
    if isinstance(weights, numbers.Integral):
        count = checks.positive_int(cast(int, weights), "weights")
        if count > MAX_STEPS:
            raise ValueError(f"weights must be at most {MAX_STEPS}, got {weights}.")
        weights = torch.linspace(0, 1, count, dtype=torch.float64).tolist()
    weights = _real(weights, "weights").flatten().tolist()
    if not weights or not all(0 <= w <= 1 for w in weights):
        raise ValueError(f"weights must be numbers in [0, 1], got {list(weights)}.")
    z0, z1 = (encode(model, x, rtol=rtol, atol=atol, cond=cond) for x in (x0, x1))
    path = torch.cat([slerp(z0, z1, w) for w in weights])
    rows = torch.arange(x0.shape[0], device=x0.device).repeat(len(weights))
    out = decode(model, path, rtol=rtol, atol=atol, cond=conditions.take_rows(cond, rows))
    return out.reshape(len(weights), *x0.shape)


def _real(weight: Any, name: str) -> Tensor:
    """Weights as float64. Raises `TypeError` for what is no real number."""
    try:
        kind = torch.as_tensor(weight).dtype
        w = torch.as_tensor(weight, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"{name} must be real numbers, got {weight!r}.") from e
    if kind == torch.bool or kind.is_complex:
        raise TypeError(f"{name} must be real numbers, got {kind}.")
    return w


def _flow(model: ScoreModel, x: Tensor, start: float, end: float, rtol: float, atol: float, cond: Any) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with evaluating(model):
        solution = solve_flow(model, x, start, end, rtol=rtol, atol=atol, cond=cond)
    solution.raise_if_failed()
    return solution.x
