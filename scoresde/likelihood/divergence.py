r"""Traces of Jacobians: exact, or estimated with random probes.

Layer 3. Each estimator gets a function v(u), differentiable and independent across the batch, and returns v and one
or more estimates of $\mathrm{tr}(\partial v/\partial u)$ per example, from one forward evaluation and one
vector-Jacobian product per probe that share its graph. Probes are drawn once per solve (Grathwohl et al. 2019, section
3.1): an error control that saw fresh probes at every stage would never accept a step.
"""

from __future__ import annotations

import functools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from scoresde import checks
from scoresde.rng import RandomSource

Velocity = Callable[[Tensor], Tensor]
ProbeSequence = Callable[[int], "Tensor | None"]


EXACT_UP_TO = 32  # entries of an example up to which the exact trace is the default


class Divergence(ABC):
    """An estimator of tr(dv/du)."""

    def probes(self, shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> Tensor | None:
        """Random probes (B, k, *event) for a batch of the given shape (B, *event), or None if none are needed."""
        return None

    def probe_sequence(self, shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> ProbeSequence:
        """Probes for each of many places along a trajectory, asked for in order 0, 1, ...: new ones at every place."""
        return lambda place: self.probes(shape, dtype, source)

    @abstractmethod
    def __call__(
        self, velocity: Velocity, u: Tensor, probes: Tensor | None, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(v, traces): v(u) with the shape of u (B, *) and (B, k) estimates in float64, k = 1 for an exact trace.

        Both are detached unless `differentiable`, which keeps their graph to u and to the parameters.
        """


class Exact(Divergence):
    """The trace itself, by d vector-Jacobian products per evaluation, d the number of entries of one example."""

    def __call__(
        self, velocity: Velocity, u: Tensor, probes: Tensor | None, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        graph = _Graph(velocity, u, differentiable)
        d, rows = u[0].numel(), []
        unit = torch.zeros(u.shape, dtype=graph.v.dtype, device=u.device)  # contiguous, so that flatten is a view
        for i in range(d):
            unit.flatten(1)[:, i] = 1.0
            rows.append(graph.product(unit, last=i + 1 == d).flatten(1)[:, i].double())
            unit.flatten(1)[:, i] = 0.0
            if len(rows) == 64:
                rows = [torch.stack(rows).sum(0)]
        return graph.value, torch.stack(rows).sum(0)[:, None]


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

    def __call__(
        self, velocity: Velocity, u: Tensor, probes: Tensor | None, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.mode == "forward" and not differentiable:
            try:
                return _forward_mode(velocity, u, cast(Tensor, probes))
            except (NotImplementedError, RuntimeError) as e:
                warnings.warn(
                    f"forward-mode differentiation failed ({str(e).splitlines()[0]}); going on in reverse mode.",
                    stacklevel=2,
                )
                self.mode = "reverse"
        graph = _Graph(velocity, u, differentiable)
        return graph.value, graph.quadratic_forms(cast(Tensor, probes))


class Hadamard(Divergence):
    r"""Hutchinson's estimate with orthogonal probes: rows of a Walsh-Hadamard matrix times a random sign vector.

    $z_i = s \circ w_i$, s uniform on $\{-1, 1\}^d$, so that $E[z_i z_i^T] = I$ for every row. The error of a mean over rows is
    $\sum_{p \ne q} s_p s_q J_{pq}\,\overline{w_p w_q}$, and rows are taken in a hierarchical order (Stathopoulos et al. 2013): a
    checkerboard first, then ever coarser patterns along all axes, so that pairs of near entries, where J is large, cancel
    first. With as many rows as the next powers of two of the axes the trace is exact.

    `probes` are split among `replicates` sign vectors; each replicate is one estimate, and the scatter of these independent
    estimates gives the standard error (one replicate gives none). Along a trajectory (`probe_sequence`) the sign vectors stay and
    every place takes the next rows: the errors of neighbouring places cancel too.
    """

    def __init__(self, probes: int = 8, replicates: int = 2):
        self.count = checks.positive_int(probes, "probes")
        self.replicates = checks.positive_int(replicates, "replicates")
        if self.count % self.replicates:
            raise ValueError(f"probes must be a multiple of replicates, got {probes} and {replicates}.")
        self.rows = self.count // self.replicates

    def probes(self, shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> Tensor:
        return self.probe_sequence(shape, dtype, source)(0)

    def probe_sequence(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        source: RandomSource,
    ) -> Callable[[int], Tensor]:
        event = tuple(shape[1:])
        size = hadamard_size(event)
        if self.rows > size:
            raise ValueError(
                f"there are {size} orthogonal probes for examples of shape {event}, asked for {self.rows} per replicate; "
                "use fewer, or Exact()."
            )
        signs = _signs((shape[0], self.replicates, *event), dtype, source)[:, :, None]

        def at(place: int) -> Tensor:
            rows = [(place * self.rows + i) % size for i in range(self.rows)]
            return (signs * hadamard_rows(rows, event, signs.device).to(signs)).flatten(
                1, 2
            )  # (B, replicates * rows, *event)

        return at

    def __call__(
        self, velocity: Velocity, u: Tensor, probes: Tensor | None, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        graph = _Graph(velocity, u, differentiable)
        forms = graph.quadratic_forms(cast(Tensor, probes))
        return graph.value, forms.unflatten(1, (self.replicates, self.rows)).mean(2)


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

    def __call__(
        self, velocity: Velocity, u: Tensor, probes: Tensor | None, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        graph = _Graph(velocity, u, differentiable)
        third = self.count // 3
        flat = cast(Tensor, probes).flatten(2).double()

        def products(rows: Tensor, last: bool = False) -> Tensor:
            """M applied to rows (B, k, d)."""
            n = rows.shape[1]
            out = [
                graph.product(rows[:, i].reshape(u.shape).to(graph.v.dtype), last=last and i + 1 == n) for i in range(n)
            ]
            return torch.stack(out, 1).flatten(2).double()

        basis = torch.linalg.qr(products(flat[:, :third]).mT).Q.mT  # (B, k, d), orthonormal rows
        inside = (products(basis) * basis).sum((1, 2))
        rest = flat[:, third:] - (flat[:, third:] @ basis.mT) @ basis
        outside = (products(rest, last=True) * rest).sum(2)
        return graph.value, inside[:, None] + outside


def default_divergence(d: int) -> Divergence:
    """`Exact()` up to 32 dimensions; beyond, two sign vectors with four orthogonal probes each, `Hadamard(8, 2)`."""
    return Exact() if d <= EXACT_UP_TO else Hadamard(8, 2)


def check_divergence(divergence: Any) -> None:
    """`TypeError` unless it is None or an instance of a `Divergence`."""
    if divergence is not None and not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be Exact(), Hutchinson(...) or another Divergence, got {divergence!r}.")


class _Graph:
    """v(u) with its graph, for vector-Jacobian products that share it; `value` is v as estimators hand it on."""

    def __init__(self, velocity: Velocity, u: Tensor, differentiable: bool):
        self.differentiable = differentiable
        with torch.enable_grad():
            self.leaf = u if differentiable and u.requires_grad else u.detach().requires_grad_(True)
            self.v = velocity(self.leaf)
        if not self.v.requires_grad:
            raise ValueError(
                "the model's output does not depend on x differentiably, so it has no divergence; remove no_grad, detach "
                "or inference_mode from the network."
            )
        self.value = self.v if differentiable else self.v.detach()

    def product(self, direction: Tensor, last: bool) -> Tensor:
        """direction^T dv/du, (B, *); the graph is freed after the `last`."""
        keep = self.differentiable
        try:
            return torch.autograd.grad(
                self.v,
                self.leaf,
                direction.clone() if keep else direction,
                retain_graph=keep or not last,
                create_graph=keep,
            )[0]
        except NotImplementedError as e:
            raise self._refusal(e) from e
        except RuntimeError as e:
            if not any(word in str(e) for word in ("derivative", "differentiable", "in the graph")):
                raise
            raise self._refusal(e) from e

    @staticmethod
    def _refusal(e: Exception) -> ValueError:
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        return ValueError(
            f"the network cannot be differentiated with respect to x ({why}), so its divergence cannot be computed; replace the "
            "operator, remove detach, or use encode and sample, which need no derivatives."
        )

    def quadratic_forms(self, probes: Tensor) -> Tensor:
        """z^T (dv/du) z for each probe of (B, k, *): (B, k) in float64."""
        forms, k = [], probes.shape[1]
        for i in range(k):
            z = probes[:, i]
            forms.append((self.product(z, last=i + 1 == k).double() * z.double()).flatten(1).sum(1))
        return torch.stack(forms, 1)


def _signs(shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> Tensor:
    return torch.where(source.uniform(shape, torch.float32) < 0.5, -1.0, 1.0).to(dtype)


def hadamard_size(event: tuple[int, ...]) -> int:
    """How many orthogonal sign patterns `hadamard_rows` knows for an event: the product of its axes' next powers of two."""
    return math.prod(1 << (n - 1).bit_length() for n in event)


def hadamard_rows(rows: Sequence[int], event: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Sign patterns (len(rows), *event) of a Walsh-Hadamard matrix in hierarchical order; row 0 is constant.

    Entry p of row r is (-1)^(number of common bits of mask(r) and code(p)): code(p) has the bits of p's index along every axis,
    and mask(r) is the sum (modulo 2) of the generators that the bits of r choose (`_generators`).
    """
    code, generators = _code(event, str(device)), _generators(event)
    masks = [functools.reduce(lambda m, g: m ^ g, (g for i, g in enumerate(generators) if r >> i & 1), 0) for r in rows]
    bits = torch.stack([code & mask for mask in masks])  # on the device: a table from the host would stall it
    for shift in (32, 16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return 1 - 2 * (bits & 1)


def _axis_bits(event: tuple[int, ...]) -> list[list[int]]:
    """For every axis the single-bit masks of its index, lowest first."""
    masks, used = [], 0
    for n in event:
        count = (n - 1).bit_length()
        masks.append([1 << (used + i) for i in range(count)])
        used += count
    return masks


@functools.lru_cache(maxsize=8)
def _code(event: tuple[int, ...], device: str) -> Tensor:
    """The bits of every entry's index along all axes, as one integer, shape `event`."""
    code = torch.zeros(event, dtype=torch.int64)
    for axis, (n, masks) in enumerate(zip(event, _axis_bits(event), strict=True)):
        if masks:
            index = torch.arange(n) * masks[0]
            code += index.reshape(-1, *(1,) * (len(event) - axis - 1))
    return code.to(device)


@functools.lru_cache(maxsize=8)
def _generators(event: tuple[int, ...]) -> list[int]:
    """Masks that span all patterns, in the order in which rows take them up.

    The checkerboard (the lowest bits of all axes at once); the first axis of an image's event (channels, which are strongly
    coupled at one pixel) and the first spatial axis; the checkerboard of 2x2 blocks, the next bit of the axes; and so on. What
    earlier masks span is left out. On the Jacobians of digits networks this order had the smallest variance of those tried.
    """
    axes = _axis_bits(event)
    channels, spatial = (axes[:1], axes[1:]) if len(event) > 1 else ([], axes)
    candidates = [sum(a[0] for a in axes if a)] + [m for a in channels for m in a]
    for level in range(max((len(a) for a in spatial), default=0)):
        masks = [a[level] for a in spatial if level < len(a)]
        candidates += [sum(masks), *masks]
    chosen: list[int] = []
    reduced: list[int] = []
    for mask in candidates:
        rest = mask
        for r in reduced:
            rest = min(rest, rest ^ r)
        if rest:
            chosen.append(mask)
            reduced = sorted([*reduced, rest], reverse=True)
    return chosen


def _forward_mode(velocity: Velocity, u: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """By dual numbers: v and z^T (dv/du) z, one evaluation per probe."""
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
