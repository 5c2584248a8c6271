r"""Problems for `likelihood.py` and the truth about them: exact mixtures, and trained networks solved to the end.

`solve_truth` keeps the integral of the flow's whole Jacobian, so one solve is the truth for an exact trace and for any
probes. In closed form where there is one; otherwise the network's own flow in float64, once, in a file if wanted.
"""

from __future__ import annotations

import hashlib
import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from problems import PROBLEMS
from torch import Tensor

from scoresde import VPSDE, GaussianMixture, ScoreModel, ScoreNet, denoising_loss, load, ode
from scoresde.data import digits
from scoresde.flow import AnglePath
from scoresde.likelihood import dequantize
from scoresde.nets import MLP


def signs(shape: tuple[int, ...], count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rademacher probes (B, count, *event)."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (shape[0], count, *shape[1:]), generator=g) * 2 - 1).to(dtype)


def units(x: Tensor) -> list[Tensor]:
    """The d unit directions of a batch (B, *), each (B, *)."""
    d = x[0].numel()
    eye = torch.eye(d, dtype=x.dtype)
    return [eye[i].reshape(x.shape[1:]).expand(x.shape).contiguous() for i in range(d)]


# -- the truth -------------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """What the exact flow of a batch comes to: `base` (B,), all of log p but the trace; `matrix` (B, d, d), the integral of
    dv/du along the path, whose trace is the rest. A solve with given probes aims at its quadratic forms with them."""

    base: Tensor
    matrix: Tensor

    def log_prob(self, probes: Tensor | None = None) -> Tensor:
        """(B,) nats, exactly, or as the mean over given probes (B, k, *) would have it."""
        if probes is None:
            return self.base + self.matrix.diagonal(dim1=1, dim2=2).sum(1)
        z = probes.flatten(2).double()
        return self.base + torch.einsum("bki,bij,bkj->bk", z, self.matrix, z).mean(1)

    def probe_variance(self) -> Tensor:
        """(B,) variance of the estimate from one Rademacher probe: twice the squares of the symmetric part off its diagonal."""
        symmetric = (self.matrix + self.matrix.mT) / 2
        return 2 * (symmetric.square().sum((1, 2)) - symmetric.diagonal(dim1=1, dim2=2).square().sum(1))


def solve_truth(model: ScoreModel, x: Tensor, panels: int, points: int = 8, probe: Tensor | None = None) -> Truth:
    """The flow of float64 examples to 1e-9, and the integral of its whole Jacobian by Gauss-Legendre panels in log tan theta.

    The path is that of `scoresde.flow`, u = x / S on the angle theta. With one `probe` (B, *), its quadratic form alone
    (the cheap way to see whether there are panels enough), in a matrix of one entry.
    """
    path, d = AnglePath(model.sde, model.sigma_data), x[0].numel()
    ends = (model.sde.t_min, model.flow_end)
    low, high = (float(path.angle(t)) for t in ends)
    nodes, weights = np.polynomial.legendre.leggauss(points)
    edges = np.linspace(np.log(np.tan(low)), np.log(np.tan(high)), panels + 1)
    half = np.diff(edges)[:, None] / 2
    angles = np.arctan(np.exp((edges[:-1, None] + half + half * nodes).ravel()))
    steps = (half * weights).ravel() * np.sin(angles) * np.cos(angles)
    directions = units(x) if probe is None else [probe]

    def velocity(u: Tensor, theta: Tensor) -> Tensor:
        return path.velocity(model, u, theta, ends, None)

    @torch.no_grad()
    def slope(theta: Tensor, u: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return velocity(u, theta), None

    u, now = x / path.scale(ends[0]), low
    matrix = torch.zeros(len(x), len(directions), d if probe is None else 1, dtype=torch.float64)
    for theta, step in zip(angles.tolist(), steps.tolist(), strict=True):
        u, now = ode.solve(slope, u, now, theta, rtol=1e-9, atol=1e-9).y, theta
        leaf = u.detach().requires_grad_(True)
        v = velocity(leaf, torch.full((len(u),), theta, dtype=torch.float64))
        for i, z in enumerate(directions):
            row = torch.autograd.grad(v, leaf, z, retain_graph=i + 1 < len(directions))[0]
            matrix[:, i] += step * (row.flatten(1) if probe is None else (row * z).flatten(1).sum(1, keepdim=True))
    u = ode.solve(slope, u, now, high, rtol=1e-9, atol=1e-9).y
    stretch = d * float(torch.log(path.scale(ends[1]) / path.scale(ends[0])))
    return Truth(model.terminal_log_prob(u * path.scale(ends[1])) + stretch, matrix)


# -- problems --------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model, points to score and pilots with their truths; `closed` (B,) where a closed form is known."""

    name: str
    kind: str
    model: ScoreModel
    x: Tensor
    truth: Truth
    closed: Tensor | None = None
    check: float = math.nan  # nats: what the truth still changes with twice the panels, or against the closed form
    pilot: Case | None = None

    def goal(self, probes: Tensor | None) -> Tensor:
        """What a solve aims at, with an exact trace or with given probes."""
        return self.closed if probes is None and self.closed is not None else self.truth.log_prob(probes)


def mixture_case(name: str, n: int, seed: int = 101) -> Case:
    """n exact draws, and a quarter as many pilots."""
    mixture = GaussianMixture(*PROBLEMS[name]())
    model, x = mixture.diffuse(VPSDE()), mixture.sample(n, seed=seed)
    truth, closed = solve_truth(model, x, panels=32), model.log_prob(x, model.sde.t_min)
    pilot = mixture_case(name, n // 4, seed + 1) if seed == 101 else None
    return Case(name, "2d", model, x, truth, closed, float((truth.log_prob() - closed).abs().max()), pilot)


def trained_mlp(steps: int) -> ScoreModel:
    """A noise-predicting perceptron on moons."""
    data = GaussianMixture(*PROBLEMS["moons"]()).sample(20_000, seed=1, dtype=torch.float32)
    torch.manual_seed(0)
    net = ScoreNet(MLP(2), VPSDE(), "noise")
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = torch.randint(len(data), (256,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        denoising_loss(net, data[rows], seed=step).mean().backward()
        optimizer.step()
        schedule.step()
    return net


def network_case(
    name: str, kind: str, model: ScoreModel, x: Tensor, pilots: Tensor, panels: int, cache: Path | None
) -> Case:
    """A trained network in float32; the truth is that of its float64 copy, kept in `cache`."""
    model = model.eval().requires_grad_(False)
    double = deepcopy(model).double()
    truths, check = [], math.nan
    for points in (x, pilots):
        mark = hashlib.sha256(repr((panels, type(model.sde).__name__)).encode() + points.numpy().tobytes())
        for value in model.state_dict().values():
            mark.update(value.contiguous().numpy().tobytes())
        key, kept = mark.hexdigest()[:16], {}
        if cache is not None and cache.exists():
            with np.load(cache) as file:
                kept = dict(file)
        if f"{key}-matrix" not in kept:
            print(f"{name}: the truth of {len(points)} points", flush=True)
            truth = solve_truth(double, points.double(), panels)
            few, probe = points[:4].double(), signs(tuple(points.shape), 1, 7, torch.float64)[:4, 0]
            ends = [solve_truth(double, few, n, probe=probe) for n in (panels, 2 * panels)]
            left = float(
                (ends[1].base + ends[1].matrix.flatten() - ends[0].base - ends[0].matrix.flatten()).abs().max()
            )
            kept |= {f"{key}-base": truth.base.numpy(), f"{key}-matrix": truth.matrix.numpy(), f"{key}-check": left}
            if cache is not None:
                cache.parent.mkdir(parents=True, exist_ok=True)
                np.savez(cache, **kept)
        truths.append(Truth(*(torch.from_numpy(kept[f"{key}-{part}"]) for part in ("base", "matrix"))))
        check = float(np.fmax(check, kept[f"{key}-check"]))
    pilot = Case(name, kind, model, pilots, truths[1])
    return Case(name, kind, model, x, truths[0], check=check, pilot=pilot)


def mlp_case(model: ScoreModel, n: int, panels: int, cache: Path | None) -> Case:
    """Points of the moons that a perceptron was trained on."""
    mixture = GaussianMixture(*PROBLEMS["moons"]())
    x, pilots = (mixture.sample(k, seed=s, dtype=torch.float32) for k, s in ((n, 103), (n // 4, 104)))
    return network_case("moons-mlp", "2d", model, x, pilots, panels, cache)


def digits_case(path: Path, n: int, panels: int, cache: Path | None) -> Case:
    """Points from test images spread over the split, pilots from training images."""
    model = load(path)
    name = f"digits-{getattr(model, 'parameterization', 'quantized')}"
    points = []
    for split, count, seed in (("test", n, 105), ("train", n // 4, 106)):
        images = digits(split).values
        k = images[torch.linspace(0, len(images) - 1, count).long()]
        u = torch.rand(k.shape, generator=torch.Generator().manual_seed(seed))
        points.append(dequantize(k, model.levels, model.value_range, u))
    return network_case(name, "digits", model, *points, panels, cache)
