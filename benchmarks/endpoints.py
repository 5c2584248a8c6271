"""Exact ends of the probability flow on the mixtures of `problems.py`, and how far a sampler is from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from peers import Peer
from problems import PROBLEMS
from scipy.integrate import solve_ivp
from torch import Tensor

from scoresde import METHODS, GaussianMixture, ScoreModel, sample
from scoresde.samplers import ProbabilityFlow
from scoresde.sde import SDE

SCORED, TUNING = 9_000, 77  # seeds: those of the scored starts follow the first, tuning's starts have the second


class Counted(ScoreModel):
    """An exact mixture that counts its evaluations (of a whole batch), fast enough for many thousands of solves."""

    def __init__(self, mixture: GaussianMixture, sde: SDE):
        super().__init__()
        exact = mixture.diffuse(sde)
        self.sde, self.event_shape, self.sigma_data = sde, exact.event_shape, exact.sigma_data
        self.data_mean = mixture.mean
        k, d = mixture.means.shape
        self.means, self.values, self.logs = mixture.means, mixture.eigenvalues, mixture.weights.log()
        self.basis = mixture.eigenvectors.permute(1, 0, 2).reshape(d, k * d).contiguous()
        self.centres = torch.einsum("kij,ki->kj", mixture.eigenvectors, mixture.means)
        self.isotropic = bool((self.values - self.values[0, 0]).abs().max() < 1e-12 * self.values[0, 0])
        self.count = 0

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        self.count += 1
        t = self.time_of(t, x)
        alpha, sigma = (f(t).reshape(-1, 1) for f in (self.sde.alpha, self.sde.sigma))
        if self.isotropic:
            pull = alpha * self.values[0, 0]
            precision = 1 / (alpha * pull + sigma**2)
            joint = (precision * x) @ self.means.T * alpha
            joint += self.logs - (0.5 * alpha**2 * precision) * self.means.square().sum(1)
            mean = joint.softmax(1) @ self.means
            return pull * precision * x + sigma**2 * precision * mean
        t, row = t.reshape(-1).unique(return_inverse=True)  # rows of few different times
        row = 0 if t.numel() == 1 else row
        variance = self.sde.alpha(t)[:, None, None] ** 2 * self.values + self.sde.sigma(t)[:, None, None] ** 2
        alpha = alpha[..., None]
        offset = (x @ self.basis).reshape(len(x), *self.centres.shape).sub_(alpha * self.centres)
        scaled = offset * (1 / variance)[row]
        joint = self.logs - 0.5 * (variance.log().sum(-1)[row] + offset.mul_(scaled).sum(-1))
        share = joint.softmax(1)
        scaled *= alpha * self.values
        scaled *= share[:, :, None]
        return share @ self.means + scaled.reshape(len(x), -1) @ self.basis.T


class Case:
    """One model, the scored starts and where the probability flow takes them."""

    def __init__(self, problem: str, sde: SDE, seeds: int, starts: int):
        mixture = GaussianMixture(*PROBLEMS[problem]())
        self.model, self.sde = Counted(mixture, sde), sde
        count = min(starts, 160) if problem == "gmm64" else starts
        self.x = sde.prior_std * torch.cat(
            [
                torch.randn((count, *mixture.event_shape), generator=generator(SCORED + s), dtype=torch.float64)
                for s in range(seeds)
            ]
        )
        _check_same(self.model, mixture.diffuse(sde), self.x[:16])
        self.end = flow_end(self.model, self.x)

    def ours(self, method: Any, nfe: int, grid: Any = None) -> tuple[Tensor, int]:
        """(end, evaluations) of one of our samplers: as many steps as `nfe` holds."""
        chosen = METHODS[method]() if isinstance(method, str) else method
        self.model.count = 0
        x = sample(
            self.model,
            tuple(self.x.shape),
            method=chosen,
            nfe=nfe - nfe % chosen.nfe_per_step,
            x_init=self.x,
            grid=grid,
            denoise_final=False,
        )
        return x, self.model.count

    def theirs(self, peer: Peer, nfe: int, grid: Any) -> tuple[Tensor, int]:
        """(end, evaluations) of a peer."""
        self.model.count = 0
        return peer.solve(self.model, self.x, grid(self.sde, nfe // peer.nfe), None), self.model.count

    def errors(self, x: Tensor) -> tuple[float, float]:
        """Root mean square and median error of ends x."""
        return errors(x, self.end, self.sde)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def errors(x: Tensor, end: Tensor, sde: SDE) -> tuple[float, float]:
    square = ((x.double() - end.double()) / sde.alpha(sde.t_min)).flatten(1).square().mean(1)
    return float(square.mean().sqrt()), float(square.median().sqrt())


def flow_end(model: ScoreModel, x: Tensor, tolerance: float = 1e-10) -> Tensor:
    """The probability flow from x at t_max to t_min."""
    ends = torch.tensor([model.sde.t_max, model.sde.t_min], dtype=torch.float64)
    solver = ProbabilityFlow(tolerance, tolerance, max_nfe=100_000)
    return sample(model, tuple(x.shape), method=solver, x_init=x, grid=ends)


def _check_same(model: ScoreModel, exact: ScoreModel, x: Tensor) -> None:
    for t in (1e-3, 0.1, 0.5, 0.99):
        torch.testing.assert_close(model.denoise(x, t), exact.denoise(x, t), rtol=1e-9, atol=1e-9)


def check_reference(case: Case, count: int = 8) -> float:
    """Largest difference of `flow_end` from SciPy's DOP853 in y = x/alpha, of `count` starts one by one."""
    sde, worst = case.sde, 0.0
    top, bottom = (-0.5 * float(sde.log_snr(t)) for t in (sde.t_max, sde.t_min))
    for i in range(count):

        def slope(log_r: float, y: np.ndarray) -> np.ndarray:
            t = sde.time(torch.tensor(-2 * log_r, dtype=torch.float64))
            return math.exp(log_r) * case.model.noise(torch.from_numpy(y)[None] * sde.alpha(t), t)[0].numpy()

        start = (case.x[i] / sde.alpha(sde.t_max)).numpy()
        found = solve_ivp(slope, (top, bottom), start, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
        worst = max(worst, float(np.abs(found - (case.end[i] / sde.alpha(sde.t_min)).numpy()).max()))
    return worst
