"""Distances between two sets of samples. Layer 3."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde import checks
from scoresde.rng import RandomSource


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two sample sets (N, *) and (M, *) over random unit directions.

    sqrt of the mean over directions of W_2^2 of the projected samples, by quantiles where N and M differ
    (Bonneel et al. 2015). Its unit is that of the data. Two exact sample sets are not at distance 0 but at a noise
    floor that falls as N grows: quote it beside the figure.
    """
    a, b = checks.batch(x, "x").double().flatten(1), checks.batch(y, "y").double().flatten(1)
    if a.shape[1] != b.shape[1] or not a.shape[0] or not b.shape[0]:
        raise ValueError(f"both sets need samples of one shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    checks.positive_int(projections, "projections")
    v = RandomSource(seed, a.device, a.shape[1]).normal((a.shape[1], projections), torch.float64)
    v = v / v.norm(dim=0)
    p, q = (a @ v).sort(0).values, (b @ v).sort(0).values
    if p.shape[0] != q.shape[0]:
        n = max(p.shape[0], q.shape[0])
        grid = (torch.arange(n, dtype=torch.float64, device=p.device) + 0.5) / n
        p, q = torch.quantile(p, grid, dim=0), torch.quantile(q, grid, dim=0)
    return math.sqrt(float((p - q).square().mean()))
