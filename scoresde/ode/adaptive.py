"""Adaptive Runge-Kutta with a step size, an error and a status per example.

Layer 0: knows nothing of diffusion. Every example of a batch is its own initial value problem: it has its own time and
step, its result does not depend on its batch-mates, and once it is finished it leaves the batch, so that no
evaluation is spent on it. A quadrature q' = r(t, y) of m numbers per example (log densities, one per trace probe)
may ride along in float64; the step is controlled by the error of its mean over m.

The state is advanced by the higher-order solution; the step follows the PI rule of Hairer & Wanner (1996, IV.2) with
the RMS norm of err / (atol + rtol max(|y|, |y_new|)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from scoresde import checks
from scoresde.ode.tableaux import TABLEAUX, Tableau

# (t (A,), y (A, *), rows (A,)) -> (dy/dt (A, *), dq/dt (A, m) or None), for the A examples still running
RightHandSide: TypeAlias = "Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]"

OK, MAX_NFE, STEP_TOO_SMALL, NOT_FINITE, UNRESOLVED = range(5)
STATUS_TEXT = {
    OK: "finished",
    MAX_NFE: "stopped at max_nfe evaluations",
    STEP_TOO_SMALL: "the step size fell below the resolution of time",
    NOT_FINITE: "the right-hand side returned NaN or infinity",
    UNRESOLVED: "the finest grid left an error above the tolerance",
}


@dataclass
class Solution:
    """Where each example ended: y (B, *), q (B, m) float64, t (B,) float64, nfe (B,) and status (B,) integers."""

    y: Tensor
    q: Tensor
    t: Tensor
    nfe: Tensor
    status: Tensor


class _Batch:
    """The examples still running, row for row; `keep` drops the others."""

    def __init__(self, y: Tensor, t0: float):
        n, device = y.shape[0], y.device
        self.rows = torch.arange(n, device=device)
        self.y = y
        self.t = torch.full((n,), t0, dtype=torch.float64, device=device)
        self.h = torch.zeros_like(self.t)
        self.previous = torch.ones_like(self.t)  # error ratio of the last accepted step
        self.nfe = torch.zeros(n, dtype=torch.int64, device=device)
        self.status = torch.zeros(n, dtype=torch.int64, device=device)
        self.broken = torch.zeros(n, dtype=torch.bool, device=device)  # the last attempt met NaN or infinity
        self.dy = torch.empty_like(y)
        self.dq: Tensor | None = None
        self.q = torch.zeros(n, 0, dtype=torch.float64, device=device)

    def keep(self, index: Tensor) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[index])


def _wide(v: Tensor, like: Tensor) -> Tensor:
    return v.to(like.dtype).reshape(v.shape + (1,) * (like.dim() - 1))


def _rms(x: Tensor) -> Tensor:
    return x.double().flatten(1).square().mean(1).sqrt()


def solve(
    f: RightHandSide,
    y0: Tensor,
    t0: float,
    t1: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    q_tol: float = 1e-4,
    method: str = "tsit5",
    max_nfe: int = 10_000,
) -> Solution:
    """Integrate y' = f(t, y) (and q' = r(t, y), q(t0) = 0) from t0 to t1, in either direction.

    Arguments: y0 (B, *); `rtol`, `atol` per step on y; `q_tol`, absolute, per step on q; `method`, one of "bosh3",
    "dopri5", "tsit5"; `max_nfe`, evaluations per example after which it stops where it is. f is never evaluated outside
    [t0, t1]. Nothing is raised for examples that fail: they carry a status (`STATUS_TEXT`). Raises `ValueError` for
    tolerances or budgets that are not positive.
    """
    tableau = TABLEAUX[checks.choice(method, TABLEAUX, "Runge-Kutta method")]
    for name, value in (("rtol", rtol), ("atol", atol), ("q_tol", q_tol)):
        checks.positive(value, name)
    checks.positive_int(max_nfe, "max_nfe")
    n = y0.shape[0]
    out = Solution(
        y0.clone(),
        torch.zeros(n, 0, dtype=torch.float64, device=y0.device),
        torch.full((n,), t0, dtype=torch.float64, device=y0.device),
        torch.zeros(n, dtype=torch.int64, device=y0.device),
        torch.zeros(n, dtype=torch.int64, device=y0.device),
    )
    if n == 0 or t0 == t1:
        return out
    direction = 1.0 if t1 > t0 else -1.0
    span = abs(t1 - t0)
    smallest = 1e-12 * span
    check_every = 1 if y0.device.type == "cpu" else 8  # each look at the flags stalls a GPU once
    b = _Batch(y0.clone(), t0)
    b.dy, b.dq = f(b.t, b.y, b.rows)
    if b.dq is not None:
        b.q = torch.zeros_like(b.dq, dtype=torch.float64)
        out.q = torch.zeros_like(b.q)
    _first_step(b, f, direction, span, tableau.order, rtol, atol)
    attempt = 0
    while b.rows.numel():
        _attempt(b, f, t1, direction, tableau, rtol, atol, q_tol)
        gone = (t1 - b.t) * direction
        b.status = torch.where(
            (b.status == OK) & (gone > 0) & (b.h < smallest) & (b.h < gone),
            torch.where(b.broken, NOT_FINITE, STEP_TOO_SMALL),
            b.status,
        )
        b.status = torch.where((b.status == OK) & (gone > 0) & (b.nfe >= max_nfe), MAX_NFE, b.status)
        attempt += 1
        if attempt % check_every == 0:
            running = (b.status == OK) & ((t1 - b.t) * direction > 0)
            if not bool(running.all()):
                done = (~running).nonzero().squeeze(1)
                for name in ("y", "q", "t", "nfe", "status"):
                    getattr(out, name)[b.rows[done]] = getattr(b, name)[done]
                b.keep(running.nonzero().squeeze(1))
    return out


def _first_step(
    b: _Batch, f: RightHandSide, direction: float, span: float, order: int, rtol: float, atol: float
) -> None:
    """Hairer, Norsett & Wanner 1993, II.4: a first step per example from two slopes."""
    scale = atol + rtol * b.y.abs()
    d0, d1 = _rms(b.y / scale), _rms(b.dy / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6 * span, 0.01 * d0 / d1.clamp_min(1e-300)).clamp_max(0.1 * span)
    h0 = torch.nan_to_num(h0, nan=1e-6 * span)
    slope, _ = f(b.t + direction * h0, b.y + _wide(direction * h0, b.y) * b.dy, b.rows)
    d2 = _rms((slope - b.dy) / scale) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(
        steepest <= 1e-15, (1e-3 * h0).clamp_min(1e-6 * span), (0.01 / steepest.clamp_min(1e-300)) ** (1 / order)
    )
    b.h = torch.nan_to_num(torch.minimum(100 * h0, h1), nan=1e-6 * span).clamp(1e-8 * span, span)
    b.nfe += 2


def _attempt(
    b: _Batch,
    f: RightHandSide,
    t1: float,
    direction: float,
    tableau: Tableau,
    rtol: float,
    atol: float,
    q_tol: float,
) -> None:
    """One step of every running example, accepted or rejected example by example."""
    left = (t1 - b.t) * direction  # 0 for examples that finished since the last look
    last = b.h >= left * (1 - 1e-10)
    h = torch.where(last, left, b.h) * direction
    step = _wide(h, b.y)
    slopes, rates = [b.dy], [b.dq]
    y = b.y
    for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
        y = b.y + step * _weighted(row, slopes)
        t = torch.where(last & (c == 1.0), t1, b.t + c * h)
        dy, dq = f(t, y, b.rows)
        slopes.append(dy)
        rates.append(dq)
    error = step * _weighted(tableau.e, slopes)
    ratio = _rms(error / (atol + rtol * torch.maximum(b.y.abs(), y.abs())))
    q = b.q
    if b.dq is not None:
        known = cast("list[Tensor]", rates)  # a right-hand side gives them always or never
        q = b.q + h[:, None] * _weighted(tableau.a[-1], known)
        ratio = torch.maximum(ratio, (h * _weighted(tableau.e, known).mean(1)).abs() / q_tol)
    b.broken = ~torch.isfinite(ratio)
    ratio = torch.where(b.broken, torch.inf, ratio)
    accept = (ratio <= 1) & (b.status == OK)
    k = 1 / tableau.order
    grow = 0.9 * ratio.clamp_min(1e-10) ** (-0.7 * k) * b.previous ** (0.4 * k)
    grow = torch.where(accept, grow.clamp(0.2, 8.0), (0.9 * ratio.clamp_min(1e-10) ** -k).clamp(0.1, 0.9))
    wide = accept.reshape(accept.shape + (1,) * (y.dim() - 1))
    b.nfe += (tableau.stages - 1) * ((b.status == OK) & (left > 0))
    b.t = torch.where(accept, torch.where(last, t1, b.t + h), b.t)
    b.y = torch.where(wide, y, b.y)
    b.dy = torch.where(wide, slopes[-1], b.dy)
    if b.dq is not None:
        b.q = torch.where(accept[:, None], q, b.q)
        b.dq = torch.where(accept[:, None], cast("Tensor", rates[-1]), b.dq)
    b.previous = torch.where(accept, ratio.clamp_min(1e-4), b.previous)
    b.h = torch.where(left > 0, h.abs() * grow, b.h)


def _weighted(weights: tuple[float, ...], terms: list[Tensor]) -> Tensor:
    total: Tensor | None = None
    for w, term in zip(weights, terms, strict=False):
        if w:
            total = term * w if total is None else torch.add(total, term, alpha=w)
    return cast("Tensor", total)  # no row of a tableau is all zeros
