r"""Traces of Jacobians: exact, or estimated with random probes.

Layer 3. Each estimator gets a function v(u), differentiable and independent across the batch, and returns v and one
or more estimates of $\mathrm{tr}(\partial v/\partial u)$ per example, from one forward evaluation and one
vector-Jacobian product per probe that share its graph. Probes are drawn once per solve (Grathwohl et al. 2019, section
3.1): an error control that saw fresh probes at every stage would never accept a step.
"""

from __future__ import annotations

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

    Arguments: `probes`, how many per example; `distribution`, "rademacher" (the smaller variance) or "gaussian".
    The k estimates of an example are independent, so their scatter gives the standard error; one probe gives none.
    """

    def __init__(self, probes: int = 4, distribution: str = "rademacher"):
        self.count = checks.positive_int(probes, "probes")
        self.distribution = checks.choice(distribution, ("rademacher", "gaussian"), "probe distribution")

    def probes(self, shape: Sequence[int], dtype: torch.dtype, source: RandomSource) -> Tensor:
        full = (shape[0], self.count, *shape[1:])
        if self.distribution == "gaussian":
            return source.normal(full, dtype)
        return torch.where(source.uniform(full, torch.float32) < 0.5, -1.0, 1.0).to(dtype)

    def __call__(self, velocity: Velocity, u: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf, v = _forward(velocity, u)
        traces = []
        for i in range(self.count):
            z = probes[:, i]
            row = _vjp(v, leaf, z, keep=i + 1 < self.count)
            traces.append((row.double() * z.double()).flatten(1).sum(1))
        return v.detach(), torch.stack(traces, 1)


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
