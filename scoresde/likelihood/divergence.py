r"""Traces of Jacobians: exact, or estimated with random probes.

Layer 3. Each estimator gets a function v(u), differentiable and independent across the batch, and returns v and one
or more estimates of $\mathrm{tr}(\partial v/\partial u)$ per example, from one forward evaluation and one
vector-Jacobian product per probe that share its graph. Probes are drawn once per solve (Grathwohl et al. 2019, section
3.1): an error control that saw fresh probes at every stage would never accept a step.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde import checks
from scoresde.rng import RandomSource

Velocity = Callable[[Tensor], Tensor]


class Divergence(ABC):
    """An estimator of tr(dv/du)."""

    def probes(self, shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> Tensor | None:
        """Random probes (B, k, *event) for a batch of the given shape (B, *event), or None if none are needed."""
        return None

    @abstractmethod
    def __call__(self, velocity: Velocity, u: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """(v, traces): v(u) with the shape of u (B, *) and (B, k) estimates in float64, k = 1 for an exact trace."""


class Exact(Divergence):
    """The trace itself, by d vector-Jacobian products per evaluation, d the number of entries of one example."""

    def __call__(self, velocity: Velocity, u: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf, v = _forward(velocity, u)
        d = u[0].numel()
        trace = torch.zeros(u.shape[0], dtype=torch.float64, device=u.device)
        unit = torch.zeros(v.shape, dtype=v.dtype, device=v.device)  # contiguous, so that flatten is a view
        for i in range(d):
            unit.flatten(1)[:, i] = 1.0
            row = _vjp(v, leaf, unit, keep=i + 1 < d)
            unit.flatten(1)[:, i] = 0.0
            trace += row.flatten(1)[:, i].double()
        return v.detach(), trace[:, None]


class Hutchinson(Divergence):
    """E[z^T (dv/du) z] over probes with E[z z^T] = I (Hutchinson 1990; Song et al. 2021, equation 40).

    Arguments: `probes`, how many per example; `distribution`, "rademacher" (the smaller variance) or "gaussian";
    `mode`, "reverse" (vector-Jacobian products that share one forward evaluation) or "forward" (dual numbers, one forward
    evaluation per probe: less memory, more time; where an operator does not know them, a warning says so and reverse is used).
    The k estimates of an example are independent, so their scatter gives the standard error; one probe gives none.
    """

    def __init__(self, probes: int = 4, distribution: str = "rademacher", mode: str = "reverse"):
        self.count = checks.positive_int(probes, "probes")
        self.distribution = checks.choice(distribution, ("rademacher", "gaussian"), "probe distribution")
        self.mode = checks.choice(mode, ("reverse", "forward"), "mode of differentiation")

    def probes(self, shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> Tensor:
        full = (shape[0], self.count, *shape[1:])
        return source.normal(full, dtype) if self.distribution == "gaussian" else _signs(full, dtype, source)

    def __call__(self, velocity: Velocity, u: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.mode == "forward":
            try:
                return _forward_mode(velocity, u, probes)
            except (NotImplementedError, RuntimeError) as e:
                warnings.warn(
                    f"forward-mode differentiation failed ({str(e).splitlines()[0]}); going on in reverse mode.",
                    stacklevel=2,
                )
                self.mode = "reverse"
        leaf, v = _forward(velocity, u)
        return v.detach(), torch.stack(_quadratic_forms(v, leaf, probes), 1)


class Hadamard(Divergence):
    r"""Hutchinson's estimate with orthogonal probes: rows of a Walsh-Hadamard matrix times a random sign vector.

    $z_i = s \circ w_i$, s uniform on $\{-1, 1\}^d$, so that $E[z_i z_i^T] = I$ for every row and, among rows, the errors
    of neighbouring entries cancel (Tang & Saad 2012; Stathopoulos et al. 2013, hierarchical probing). With as many rows as the
    next power of two after d the trace is exact. `probes` are split among `replicates` sign vectors; each replicate is one
    estimate, and the scatter of these independent estimates gives the standard error (one replicate gives none).
    """

    def __init__(self, probes: int = 8, replicates: int = 2):
        self.count = checks.positive_int(probes, "probes")
        self.replicates = checks.positive_int(replicates, "replicates")
        if self.count % self.replicates:
            raise ValueError(f"probes must be a multiple of replicates, got {probes} and {replicates}.")

    def probes(self, shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> Tensor:
        signs = _signs((shape[0], self.replicates, *shape[1:]), dtype, source)
        rows = _walsh(self.count // self.replicates, signs[0, 0].numel(), signs).reshape(-1, *shape[1:])
        return (signs[:, :, None] * rows).flatten(1, 2)  # (B, replicates * rows, *event)

    def __call__(self, velocity: Velocity, u: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf, v = _forward(velocity, u)
        forms = torch.stack(_quadratic_forms(v, leaf, probes), 1)
        return v.detach(), forms.reshape(len(u), self.replicates, -1).mean(2)


class HutchPlusPlus(Divergence):
    """Hutch++ (Meyer et al. 2021): the trace on the range of a random sketch exactly, Hutchinson's estimate on the rest.

    With M = (dv/du)^T, an orthonormal basis Q of M S for normal vectors S (a third of the probes; sign vectors could coincide
    and leave Q to rounding, which an error control would chase), the estimates are
    tr(Q^T M Q) + g_i^T (I - Q Q^T) M (I - Q Q^T) g_i for sign vectors g_i (another third); unbiased, and better than
    Hutchinson's where a few directions carry the trace. `probes` counts vector-Jacobian products, a multiple of 3.
    """

    def __init__(self, probes: int = 6):
        self.count = checks.positive_int(probes, "probes")
        if self.count % 3:
            raise ValueError(f"probes must be a multiple of 3 (sketch, basis, remainder), got {probes}.")

    def probes(self, shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> Tensor:
        full = (shape[0], self.count // 3, *shape[1:])
        return torch.cat([source.normal(full, dtype), _signs(full, dtype, source)], 1)

    def __call__(self, velocity: Velocity, u: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf, v = _forward(velocity, u)
        third = self.count // 3
        flat = probes.flatten(2).double()

        def products(rows: Tensor, last: bool = False) -> Tensor:
            """M applied to rows (B, k, d)."""
            n = rows.shape[1]
            out = [
                _vjp(v, leaf, rows[:, i].reshape(v.shape).to(v.dtype), keep=not (last and i + 1 == n)) for i in range(n)
            ]
            return torch.stack(out, 1).flatten(2).double()

        basis = torch.linalg.qr(products(flat[:, :third]).mT).Q.mT  # (B, k, d), orthonormal rows
        inside = (products(basis) * basis).sum((1, 2))
        rest = flat[:, third:] - (flat[:, third:] @ basis.mT) @ basis
        outside = (products(rest, last=True) * rest).sum(2)
        return v.detach(), inside[:, None] + outside


def _signs(shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> Tensor:
    return torch.where(source.uniform(shape, torch.float32) < 0.5, -1.0, 1.0).to(dtype)


def _walsh(rows: int, d: int, like: Tensor) -> Tensor:
    """The first rows of the natural-order Hadamard matrix of the next power of two, cut to d columns: (-1)^popcount(i & j)."""
    size = 1 << max(0, d - 1).bit_length()
    if rows > size:
        raise ValueError(
            f"there are {size} orthogonal probes for {d} entries, asked for {rows}; use fewer, or Exact()."
        )
    bits = torch.arange(rows, device=like.device)[:, None] & torch.arange(d, device=like.device)
    for shift in (16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return (1 - 2 * (bits & 1)).to(like.dtype)


def _quadratic_forms(v: Tensor, leaf: Tensor, probes: Tensor) -> list[Tensor]:
    """z^T (dv/du) z for each probe, (B,) in float64, from one graph."""
    forms, k = [], probes.shape[1]
    for i in range(k):
        z = probes[:, i]
        row = _vjp(v, leaf, z, keep=i + 1 < k)
        forms.append((row.double() * z.double()).flatten(1).sum(1))
    return forms


def _forward_mode(velocity: Velocity, u: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """The same by dual numbers: v and z^T (dv/du) z, one evaluation per probe."""
    forms = []
    for z in probes.unbind(1):
        with torch.autograd.forward_ad.dual_level():
            v, turned = torch.autograd.forward_ad.unpack_dual(
                velocity(torch.autograd.forward_ad.make_dual(u, z.contiguous()))
            )
        if turned is None:
            raise RuntimeError("the output carries no derivative")
        forms.append((turned.double() * z.double()).flatten(1).sum(1))
    return v, torch.stack(forms, 1)


def _forward(velocity: Velocity, u: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = u.detach().requires_grad_(True)
        v = velocity(leaf)
    if not v.requires_grad:
        raise ValueError(
            "the model's output does not depend on x differentiably, so it has no divergence; remove no_grad, detach "
            "or inference_mode from the network."
        )
    return leaf, v


def _vjp(value: Tensor, leaf: Tensor, direction: Tensor, keep: bool) -> Tensor:
    return torch.autograd.grad(value, leaf, direction, retain_graph=keep)[0]
