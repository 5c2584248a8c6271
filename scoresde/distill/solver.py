r"""Learning a few-step sampler on a user's own model.

Layer 3. The form is that of `scoresde.samplers.few_step`: n noise levels, n gains and the multistep weights. A few hundred
trajectories of the probability flow, solved with many evaluations (the teacher), say where every start should
end; the numbers are then moved, from the untuned rule, so that n evaluations end there too.

The error has a heavy tail: a few starts lie close to where trajectories part and end in another mode. Least squares would
spend all numbers on them, so the objective is the mean of $\sqrt{e^2 + \delta^2}$ over trajectories, e the root mean
square of an endpoint's error and delta half its median, minimised by Levenberg-Marquardt with iterated weights
(Holland & Welsch 1977). Jacobians are finite differences: a number that enters at evaluation i changes nothing before
it, so one column costs n - i evaluations, and all columns are evaluated as one batch.

Learned solvers of this kind: Watson et al. 2022 (DDSS), Zhao et al. 2024 (DC-Solver), Chen et al. 2024 (optimised nodes),
Tong et al. 2024 (LD3); the rotated coordinates, the free node and the robust objective are this project's.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde import checks, conditions
from scoresde.models.base import ScoreModel, require_model
from scoresde.modes import device_of, evaluating
from scoresde.progress import bar
from scoresde.rng import RandomSource, derive
from scoresde.samplers import FewStep, Scheme
from scoresde.samplers.few_step import Report, nodes, rule_weights, untuned
from scoresde.sde import expand

CHUNK = 4096  # rows per call of the model
CLOSEST = 0.97  # neighbouring noise levels keep at least this ratio
DAMPING = (10**-1.5, 10**-0.5, 10**0.5, 10**1.5)  # factors of the last damping that a step is tried with


def tune(
    model: ScoreModel,
    nfe: int,
    *,
    event_shape: tuple[int, ...] | None = None,
    cond: Any = None,
    starts: int = 1024,
    held_out: int = 512,
    teacher_nfe: int = 200,
    iterations: int = 15,
    history: int = 3,
    jacobian_starts: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> FewStep:
    """A sampler with exactly `nfe` network evaluations, learned on `model`: `sample(model, shape, method=tune(model, 8))`.

    Arguments:
        event_shape: shape of one example, where the model does not say it itself.
        cond: conditions to tune for, one row each (any number of rows): starts take them in turn.
        starts: trajectories to learn from, a quarter of which choose the iteration that is kept.
        held_out: further trajectories, seen by neither, for the figures in the result's `report`.
        teacher_nfe: evaluations of the untuned rule that a reference endpoint is computed with.
        iterations: of Levenberg-Marquardt; each costs about nfe^2 `jacobian_starts` evaluations of the network.
        history: predictions that a step may use.
        jacobian_starts: trajectories in the Jacobian: half of them the worst, the rest spread over the others.
        seed: of the starts. The result is a function of the model and these arguments.

    The noise levels, the data's mean and its scale are learned too. Where the held-out trajectories show no gain over the
    untuned rule (two standard errors of the mean difference), the untuned rule is returned, a warning says so, and
    `report.gained` is False. Tuning belongs to the model: a sampler tuned on another one may be worse than the rule.

    Raises `ValueError` for numbers out of range, a missing event shape, or nfe > 50 (the rule is then accurate enough), and
    `NonFiniteError` if the network returns NaN.
    """
    require_model(model)
    for name, value in (("nfe", nfe), ("teacher_nfe", teacher_nfe), ("iterations", iterations), ("history", history)):
        checks.positive_int(value, name)
    for name, value in (("starts", starts), ("held_out", held_out), ("jacobian_starts", jacobian_starts)):
        if checks.positive_int(value, name) < 8:
            raise ValueError(f"{name} must be at least 8, got {value}.")
    if nfe > 50 or teacher_nfe < 3 * nfe:
        raise ValueError(
            f"tuning is for 1 to 50 evaluations with a teacher of at least three times as many, got nfe={nfe} and "
            f"teacher_nfe={teacher_nfe}."
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int here, got {seed!r}.")
    if event_shape is not None and not (isinstance(event_shape, (tuple, list)) and len(event_shape)):
        raise TypeError(f"event_shape must be the shape of one example, such as (1, 8, 8), got {event_shape!r}.")
    shape = model.event_shape if event_shape is None else tuple(event_shape)
    if shape is None:
        raise ValueError("the model does not say the shape of its examples; pass event_shape=(...).")
    model.check_event(shape)
    conditions.check(cond, conditions.row_count(cond))
    if cond is not None and conditions.row_count(cond) < 1:
        raise ValueError("cond must hold at least one row, a condition for one example.")
    with evaluating(model), bar(iterations + 1, "tuning", "iteration", progress) as ticks:
        return _tune(
            model, nfe, shape, cond, starts, held_out, teacher_nfe, iterations, history, jacobian_starts, seed, ticks
        )


def _tune(
    model, nfe, shape, cond, starts, held_out, teacher_nfe, iterations, history, jacobian, seed, ticks
) -> FewStep:
    sde, device = model.sde, device_of(model)
    total = starts + held_out
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    r_max, r_min = torch.exp(-0.5 * sde.log_snr(ends)).tolist()
    if float(sde.sigma(ends[1])) == 0.0:
        raise ValueError("tuning needs sigma > 0 at t_min; use an SDE with t_min > 0.")
    y = r_max * RandomSource(derive(seed, 0x74756E65), device, total).normal((total, *shape), torch.float64).flatten(1)
    rows = None if cond is None else torch.arange(total, device=device) % conditions.row_count(cond)
    count = _Count()

    flow = _SchemeSolver(model, shape, cond, rows, model.sigma_data, torch.zeros_like(y[0]), count)
    target = flow.end(untuned(r_max, r_min, model.sigma_data, teacher_nfe), y, r_max)
    mean = target[:starts].mean(0)
    c = float((target[:starts] - mean).square().mean().sqrt())
    flow = _SchemeSolver(model, shape, cond, rows, c, mean, count)
    ticks.update()

    family = _Family(r_max, r_min, c, nfe, history)
    fitted = _fit(family, flow, y[:starts], target[:starts], iterations, jacobian, ticks)

    # what is claimed, on starts that nothing above has seen: against the rule as a user would get it
    held = slice(starts, total)
    plain = _SchemeSolver(model, shape, cond, rows, model.sigma_data, torch.zeros_like(mean), count)
    before = _errors(plain.end(untuned(r_max, r_min, model.sigma_data, nfe), y[held], r_max, starts), target[held])
    after = _errors(flow.end(fitted, y[held], r_max, starts), target[held])
    gained = _gain_shown(before, after)
    report = Report(
        nfe=nfe,
        gained=gained,
        rms=(_rms(before), _rms(after)),
        median=(float(before.median().sqrt()), float(after.median().sqrt())),
        held_out=held_out,
        evaluations=count.rows,
    )
    if not gained:
        warnings.warn(
            f"tuning gained nothing on held-out starts ({report}); the untuned rule is returned.", stacklevel=3
        )
        return FewStep(untuned(r_max, r_min, model.sigma_data, nfe), model.sigma_data, None, report)
    return FewStep(fitted, c, mean.reshape(shape), report)


class _Count:
    """Network evaluations, counted in examples."""

    rows = 0


class _SchemeSolver:
    """The velocity of the module's coordinates on a model, and solves by schemes."""

    def __init__(self, model, shape, cond, rows, c: float, mean: Tensor, count: _Count):
        self.model, self.shape, self.cond, self.rows, self.c, self.mean, self.count = (
            model,
            shape,
            cond,
            rows,
            c,
            mean,
            count,
        )

    def velocity(self, u: Tensor, r: Tensor, index: Tensor) -> Tensor:
        """v (N, d) at u (N, d) and noise levels r (N,), for the starts `index` (N,), whose conditions are used."""
        return torch.cat(
            [self._velocity(*part) for part in zip(u.split(CHUNK), r.split(CHUNK), index.split(CHUNK), strict=True)]
        )

    def _velocity(self, u: Tensor, r: Tensor, index: Tensor) -> Tensor:
        model, sde, c = self.model, self.model.sde, self.c
        t = sde.time(-2 * r.log()).clamp(sde.t_min, sde.t_max)
        size = torch.hypot(r, torch.full_like(r, c))
        x = (sde.alpha(t)[:, None] * (size[:, None] * u + self.mean)).reshape(-1, *self.shape)
        if next(model.parameters(), x).dtype != torch.float64:
            x = x.float()
        cond = None if self.rows is None else conditions.take_rows(self.cond, self.rows[index])
        denoised, noise = (v.double().flatten(1) for v in model.predict(x, t, cond))
        self.count.rows += len(u)
        v = expand(c / size, noise) * noise - expand(r / (size * c), noise) * (denoised - self.mean)
        if not bool(torch.isfinite(v).all()):
            raise checks.NonFiniteError(f"NaN or infinity from the network near sigma/alpha = {float(r[0]):.4g}.")
        return v

    def rotate(self, y: Tensor, r: float) -> Tensor:
        return (y - self.mean) / math.hypot(r, self.c)

    def end(self, scheme: Scheme, y: Tensor, r_max: float, offset: int = 0) -> Tensor:
        """y (B, d) at r_max -> y at the scheme's end; row i belongs to start offset + i."""
        parts = []
        for k, part in enumerate(y.split(CHUNK)):
            index = torch.arange(len(part), device=y.device) + offset + k * CHUNK
            parts.append(self.ends([scheme], [0], self.rotate(part, r_max), index)[0])
        return torch.cat(parts)

    def ends(self, schemes: list[Scheme], first: list[int], u0: Tensor, index: Tensor) -> Tensor:
        """Ends y (S, B, d) of several schemes; scheme p makes the same evaluations as schemes[0] before first[p]."""
        order = sorted(range(len(schemes)), key=first.__getitem__)
        r, gain, w = (
            torch.from_numpy(np.stack([getattr(schemes[p], name) for p in order])).to(u0.device)
            for name in ("r", "gain", "weights")
        )
        u = u0.expand(len(order), *u0.shape)
        seen: list[Tensor] = []
        for i in range(gain.shape[1]):
            active = max(1, sum(first[p] <= i for p in order))
            levels = r[:active, i].repeat_interleave(len(u0))
            v = self.velocity(u[:active].reshape(-1, u0.shape[1]), levels, index.repeat(active))
            v = v.reshape(active, *u0.shape)
            seen.append(torch.cat([v, v[:1].expand(len(order) - active, *u0.shape)]))
            u = (1 + gain[:, i])[:, None, None] * u
            for j in (w[:, i] != 0).any(0).nonzero().flatten().tolist():
                u = u + w[:, i, j, None, None] * seen[j]
        y = u * math.hypot(float(r[0, -1]), self.c) + self.mean
        out = torch.empty_like(y)
        out[torch.tensor(order, device=y.device)] = y
        return out


class _Family:
    """Schemes around the rule by a vector: shifts of the log levels (n), gains (n), changes of the weights in a band."""

    def __init__(self, r_max: float, r_min: float, c: float, n: int, history: int):
        self.r_max, self.c, self.n = r_max, c, n
        self.r = nodes(r_max, r_min, c, n)
        self.band = [(i, j) for i in range(n) for j in range(max(0, i + 1 - history), i + 1)]
        self.size = 2 * n + len(self.band)
        # level i is felt at evaluation i; gains and weights of step i from evaluation i + 1 on
        self.first = [*range(n), *(i + 1 for i in range(n)), *(i + 1 for i, _ in self.band)]

    def scheme(self, p: Tensor) -> Scheme | None:
        """The scheme of parameters p (size,), None where its levels are out of order."""
        values = p.numpy()
        r = np.append(self.r[:-1] * np.exp(values[: self.n]), self.r[-1])
        if not (np.isfinite(r).all() and (r[1:] < CLOSEST * r[:-1]).all() and r[0] <= self.r_max):
            return None
        w = rule_weights(r, self.c, self.r_max)
        for k, (i, j) in enumerate(self.band):
            w[i, j] += values[2 * self.n + k]
        return Scheme(r, values[self.n : 2 * self.n].copy(), w)


def _fit(
    family: _Family, flow: _SchemeSolver, y: Tensor, target: Tensor, iterations: int, jacobian: int, ticks: Any
) -> Scheme:
    """Levenberg-Marquardt with robust weights; the iterate with the best score on a quarter of the starts is kept."""
    part = len(y) // 4
    chosen, fit = slice(0, part), slice(part, None)
    u = flow.rotate(y, family.r_max)
    everyone = torch.arange(len(y), device=y.device)
    step = 1e-4 if next(flow.model.parameters(), y).dtype == torch.float64 else 1e-3

    def squares(points: list[Tensor]) -> list[Tensor | None]:
        """Mean square error per trajectory of each point, None where its scheme is out of order."""
        out = []
        for p in points:
            scheme = family.scheme(p)
            out.append(None if scheme is None else _errors(flow.ends([scheme], [0], u, everyone)[0], target))
        return out

    p = torch.zeros(family.size, dtype=torch.float64)
    (error,) = squares([p])
    best, best_score, damping = p, math.inf, 1e-2
    for it in range(iterations):
        if _score(error[chosen]) < best_score:
            best, best_score = p, _score(error[chosen])
        delta2 = 0.25 * error[fit].median()
        value = _robust(error[fit], delta2)
        index, share = _worst_and_rest(error[fit], jacobian, it)
        index = index + part
        schemes = [
            family.scheme(p),
            *(family.scheme(p + step * e) for e in torch.eye(family.size, dtype=torch.float64)),
        ]
        usable = [k for k, s in enumerate(schemes) if s is not None]
        ends = flow.ends([schemes[k] for k in usable], [[0, *family.first][k] for k in usable], u[index], index)
        moves = torch.zeros(family.size, ends[0].numel(), dtype=torch.float64, device=y.device)
        moves[torch.tensor(usable[1:], device=y.device) - 1] = ((ends[1:] - ends[0]) / step).flatten(1)
        residual = ends[0] - target[index]
        square = residual.square().mean(1)
        trust = share / (square + delta2).sqrt()
        trust = trust / trust.sum()
        weight = (trust / residual.shape[1])[:, None].expand_as(residual).flatten()
        normal = ((moves * weight) @ moves.T).cpu()
        slope = ((moves * weight) @ residual.flatten()).cpu()
        ridge = 1e-3 * float((square * trust).sum())
        diagonal = normal.diagonal() + 1e-8 * normal.diagonal().max()
        improved = False
        for _ in range(3):
            trials = [
                p - torch.linalg.solve(normal + torch.diag(damping * f * diagonal + ridge), slope + ridge * p)
                for f in DAMPING
            ]
            found = squares(trials)
            values = [math.inf if e is None else _robust(e[fit], delta2) for e in found]
            k = int(np.argmin(values))
            if values[k] < value:
                p, error, damping, improved = trials[k], found[k], max(damping * DAMPING[k], 1e-7), True
                break
            damping *= 100
        ticks.update()
        if not improved:
            break
    if _score(error[chosen]) < best_score:
        best = p
    return family.scheme(best)


def _worst_and_rest(error: Tensor, count: int, turn: int) -> tuple[Tensor, Tensor]:
    """Indices of the count/2 worst trajectories and as many spread over the others, and how many each stands for."""
    rank = error.argsort(descending=True)
    if len(rank) <= count:
        return rank, torch.ones_like(error[rank])
    top, rest = count // 2, count - count // 2
    offset = turn * 0.6180339887 % 1  # another selection in every iteration
    spread = ((torch.arange(rest, device=error.device) + offset) * (len(rank) - top) / rest).long() + top
    share = torch.cat([torch.ones(top), torch.full((rest,), (len(rank) - top) / rest)]).to(error)
    return torch.cat([rank[:top], rank[spread]]), share


def _errors(y: Tensor, target: Tensor) -> Tensor:
    """Mean square error per trajectory, (B,)."""
    return (y - target).square().mean(1)


def _rms(error: Tensor) -> float:
    return float(error.mean().sqrt())


def _robust(error: Tensor, delta2: Tensor) -> float:
    value = float((error + delta2).sqrt().mean())
    return value if math.isfinite(value) else math.inf


def _score(error: Tensor) -> float:
    """Mean over trajectories of the root mean square error: fewer than a handful of strays do not decide it."""
    value = float(error.sqrt().mean())
    return value if math.isfinite(value) else math.inf


def _gain_shown(before: Tensor, after: Tensor) -> bool:
    """Whether the same trajectories end closer, by more than two standard errors of the mean difference."""
    difference = before.sqrt() - after.sqrt()
    return float(difference.mean()) > 2 * float(difference.std()) / math.sqrt(len(difference))
