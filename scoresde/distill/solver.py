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
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scoresde import checks, conditions
from scoresde.flow import rotated_velocity, rotation
from scoresde.models.base import ScoreModel, require_model
from scoresde.modes import device_of, evaluating
from scoresde.progress import bar
from scoresde.rng import RandomSource, derive
from scoresde.samplers import FewStep, Scheme
from scoresde.samplers.few_step import REACH, Report, nodes, rule_weights, untuned

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
    options = _Options(nfe, starts, held_out, teacher_nfe, iterations, history, jacobian_starts, seed)
    if event_shape is not None and not (isinstance(event_shape, (tuple, list)) and len(event_shape)):
        raise TypeError(f"event_shape must be the shape of one example, such as (1, 8, 8), got {event_shape!r}.")
    shape = model.event_shape if event_shape is None else tuple(event_shape)
    if shape is None:
        raise ValueError("the model does not say the shape of its examples; pass event_shape=(...).")
    model.check_event(shape)
    conditions.check(cond, conditions.row_count(cond))
    if cond is not None and conditions.row_count(cond) < 1:
        raise ValueError("cond must hold at least one row, a condition for one example.")
    if float(model.sde.sigma(model.sde.t_min)) == 0.0:
        raise ValueError("tuning needs sigma > 0 at t_min; use an SDE with t_min > 0.")
    with evaluating(model), bar(iterations + 1, "tuning", "iteration", progress) as ticks:
        return _tune(model, shape, cond, options, ticks)


@dataclass(frozen=True)
class _Options:
    """The numbers that `tune` is called with."""

    nfe: int
    starts: int
    held_out: int
    teacher_nfe: int
    iterations: int
    history: int
    jacobian_starts: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("nfe", "teacher_nfe", "iterations", "history"):
            checks.positive_int(getattr(self, name), name)
        for name in ("starts", "held_out", "jacobian_starts"):
            if checks.positive_int(getattr(self, name), name) < 8:
                raise ValueError(f"{name} must be at least 8, got {getattr(self, name)}.")
        if self.nfe > 50 or self.teacher_nfe < 3 * self.nfe:
            raise ValueError(
                f"tuning is for 1 to 50 evaluations with a teacher of at least three times as many, got nfe={self.nfe} and "
                f"teacher_nfe={self.teacher_nfe}."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int here, got {self.seed!r}.")


def _tune(model: ScoreModel, shape: tuple[int, ...], cond: Any, options: _Options, ticks: Any) -> FewStep:
    sde, device, c = model.sde, device_of(model), model.sigma_data
    starts, total = options.starts, options.starts + options.held_out
    r_max, r_min = torch.exp(-0.5 * sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))).tolist()
    source = RandomSource(derive(options.seed, 0x74756E65), device, total)
    y = r_max * source.normal((total, *shape), torch.float64).flatten(1)
    rows = None if cond is None else torch.arange(total, device=device) % conditions.row_count(cond)
    spent = _Spent()

    rule = _RotatedModel(model, shape, cond, rows, c, torch.zeros_like(y[0]), spent)
    rule.mean = rule.mean_at(y, r_max) if model.data_mean is None else model.data_mean.to(y).flatten()
    reach = REACH * math.sqrt(y.shape[1])
    target = rule.end(untuned(r_max, r_min, c, c * reach, options.teacher_nfe), y, r_max)
    mean = target[:starts].mean(0)
    spread = float((target[:starts] - mean).square().mean().sqrt())
    ticks.update()

    centred = _RotatedModel(model, shape, cond, rows, spread, mean, spent)
    family = _SchemeFamily(r_max, r_min, spread, spread * reach, options.nfe, options.history)
    fitted = _fit(family, centred, y[:starts], target[:starts], options, ticks)

    # what is claimed, on starts that nothing above has seen: against the rule as a user who knows the mean would get it
    plain = untuned(r_max, r_min, c, c * reach, options.nfe)
    held = y[starts:], r_max, starts
    before, after = (_errors(m.end(s, *held), target[starts:]) for m, s in ((rule, plain), (centred, fitted)))
    report = Report(
        nfe=options.nfe,
        gained=_gain_shown(before, after),
        rms=(_rms(before), _rms(after)),
        median=(float(before.median().sqrt()), float(after.median().sqrt())),
        held_out=options.held_out,
        evaluations=spent.rows,
    )
    if not report.gained:
        warnings.warn(
            f"tuning gained nothing on held-out starts ({report}); the untuned rule is returned.", stacklevel=3
        )
        return FewStep(plain, c, rule.mean.reshape(shape), report, shape)
    return FewStep(fitted, spread, mean.reshape(shape), report, shape)


class _Spent:
    """Network evaluations so far, counted in examples."""

    rows = 0


class _RotatedModel:
    """A model in the coordinates u = (x/alpha - mean) / S of `scoresde.samplers.few_step`, with S = sqrt(r^2 + c^2), flat: (N, d).

    `rows`: which row of `cond` each start is solved under; `spent` counts what is evaluated.
    """

    def __init__(
        self,
        model: ScoreModel,
        shape: tuple[int, ...],
        cond: Any,
        rows: Tensor | None,
        c: float,
        mean: Tensor,
        spent: _Spent,
    ):
        self.model, self.shape, self.cond, self.rows = model, shape, cond, rows
        self.c, self.mean, self.spent = c, mean, spent

    @property
    def exact(self) -> bool:
        """Whether the network computes in float64."""
        return next(self.model.parameters(), self.mean).dtype == torch.float64

    def rotated(self, y: Tensor, r: float) -> Tensor:
        """u of y = x/alpha at noise level r."""
        return (y - self.mean) / math.hypot(r, self.c)

    def mean_at(self, y: Tensor, r: float) -> Tensor:
        """Mean (d,) of the denoiser over states y (B, d) at noise level r: at a high one, of the data."""
        t = self.model.sde.time(torch.tensor(-2 * math.log(r), dtype=torch.float64, device=y.device))
        total = torch.zeros_like(self.mean)
        for k, part in enumerate(y.split(CHUNK)):
            index = torch.arange(len(part), device=y.device) + k * CHUNK
            denoised, _ = self.predictions(part, t.clamp(self.model.sde.t_min, self.model.sde.t_max), index)
            total += denoised.sum(0)
        return total / len(y)

    def predictions(self, y: Tensor, t: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(D, eps_hat), flat and in float64, at x = alpha(t) y for t () or (N,) and the starts `index`."""
        alpha = self.model.sde.alpha(t)
        x = (alpha[:, None] if alpha.dim() else alpha) * y
        x = x.reshape(-1, *self.shape)
        cond = None if self.rows is None else conditions.take_rows(self.cond, self.rows[index])
        self.spent.rows += len(y)
        denoised, noise = self.model.predict(x if self.exact else x.float(), t, cond)
        return denoised.double().flatten(1), noise.double().flatten(1)

    def velocity(self, u: Tensor, r: Tensor, index: Tensor) -> Tensor:
        """v (N, d) at u (N, d) and noise levels r (N,), for the starts `index` (N,), whose conditions are used."""
        parts = zip(u.split(CHUNK), r.split(CHUNK), index.split(CHUNK), strict=True)
        return torch.cat([self._velocity(*part) for part in parts])

    def _velocity(self, u: Tensor, r: Tensor, index: Tensor) -> Tensor:
        sde = self.model.sde
        t = sde.time(-2 * r.log()).clamp(sde.t_min, sde.t_max)
        theta, size = rotation(torch.ones_like(r), r, self.c)
        denoised, noise = self.predictions(size[:, None] * u + self.mean, t, index)
        denoised = denoised - self.mean
        v = rotated_velocity(theta.cos()[:, None], theta.sin()[:, None] / self.c, denoised, noise)
        if not bool(torch.isfinite(v).all()):
            raise checks.NonFiniteError(f"NaN or infinity from the network near sigma/alpha = {float(r[0]):.4g}.")
        return v

    def end(self, scheme: Scheme, y: Tensor, r_max: float, offset: int = 0) -> Tensor:
        """y (B, d) at r_max -> y at the scheme's end; row i belongs to start offset + i."""
        parts = []
        for k, part in enumerate(y.split(CHUNK)):
            index = torch.arange(len(part), device=y.device) + offset + k * CHUNK
            parts.append(self.ends([scheme], [0], self.rotated(part, r_max), index)[0])
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
            active = max(1, sum(first[p] <= i for p in order))  # the others are still at schemes[0]'s points
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


class _SchemeFamily:
    """Schemes around the rule by a vector: shifts of the log levels (n), gains (n), changes of the weights in a band."""

    def __init__(self, r_max: float, r_min: float, c: float, reach: float, n: int, history: int):
        self.r_max, self.c, self.reach, self.n = r_max, c, reach, n
        self.r = nodes(r_max, r_min, reach, n)
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
        w = rule_weights(r, self.c, self.reach, self.r_max)
        for k, (i, j) in enumerate(self.band):
            w[i, j] += values[2 * self.n + k]
        return Scheme(r, values[self.n : 2 * self.n].copy(), w)


class _EndpointProblem:
    """Starts u (B, d), the ends `target` (B, d) that a scheme of the family should bring them to, and how far it is from that."""

    def __init__(self, family: _SchemeFamily, flow: _RotatedModel, u: Tensor, target: Tensor):
        self.family, self.flow, self.u, self.target = family, flow, u, target
        self.everyone = torch.arange(len(u), device=u.device)
        self.difference = 1e-4 if flow.exact else 1e-3  # of a parameter, for the Jacobian

    def errors(self, p: Tensor) -> Tensor | None:
        """Mean square error per trajectory (B,) with parameters p, None where their levels are out of order."""
        scheme = self.family.scheme(p)
        return None if scheme is None else _errors(self.flow.ends([scheme], [0], self.u, self.everyone)[0], self.target)

    def linearized(self, p: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (K, d) of the trajectories `index` at p, and their Jacobian (size, K d) by finite differences."""
        units = torch.eye(self.family.size, dtype=torch.float64)
        schemes = [self.family.scheme(p), *(self.family.scheme(p + self.difference * e) for e in units)]
        first = [0, *self.family.first]
        usable = [k for k, s in enumerate(schemes) if s is not None]
        ends = self.flow.ends([s for s in schemes if s is not None], [first[k] for k in usable], self.u[index], index)
        jacobian = torch.zeros(self.family.size, ends[0].numel(), dtype=torch.float64, device=ends.device)
        moved = torch.tensor(usable[1:], device=ends.device) - 1
        jacobian[moved] = ((ends[1:] - ends[0]) / self.difference).flatten(1)
        return ends[0] - self.target[index], jacobian


@dataclass
class _Quadratic:
    """The local model of the robust objective: its (Gauss-Newton) Hessian `normal`, its gradient `slope`, and a ridge on p."""

    normal: Tensor
    slope: Tensor
    ridge: float

    def minimizer(self, p: Tensor, damping: float) -> Tensor:
        """The next parameters by Levenberg-Marquardt: the Hessian's diagonal is raised by `damping` times itself."""
        diagonal = self.normal.diagonal() + 1e-8 * self.normal.diagonal().max()
        return p - torch.linalg.solve(
            self.normal + torch.diag(damping * diagonal + self.ridge), self.slope + self.ridge * p
        )


def _quadratic(residual: Tensor, jacobian: Tensor, share: Tensor, delta2: Tensor) -> _Quadratic:
    """Residuals (K, d) weighted for the mean of sqrt(e^2 + delta^2): by 1/sqrt(e^2 + delta^2) and by how many each stands for."""
    square = residual.square().mean(1)
    trust = share / (square + delta2).sqrt()
    trust = trust / trust.sum()
    weighted = jacobian * (trust / residual.shape[1])[:, None].expand_as(residual).flatten()
    ridge = 1e-3 * float((square * trust).sum())
    return _Quadratic((weighted @ jacobian.T).cpu(), (weighted @ residual.flatten()).cpu(), ridge)


def _fit(
    family: _SchemeFamily, flow: _RotatedModel, y: Tensor, target: Tensor, options: _Options, ticks: Any
) -> Scheme:
    """Levenberg-Marquardt with robust weights; the iterate with the best score on a quarter of the starts is kept."""
    problem = _EndpointProblem(family, flow, flow.rotated(y, family.r_max), target)
    part = len(y) // 4
    chosen, fit = slice(0, part), slice(part, None)
    p = torch.zeros(family.size, dtype=torch.float64)
    error = cast("Tensor", problem.errors(p))  # the rule's own levels are in order
    best, best_score, damping = p, _score(error[chosen]), 1e-2
    for turn in range(options.iterations):
        delta2 = 0.25 * error[fit].median()
        index, share = _worst_and_rest(error[fit], options.jacobian_starts, turn)
        local = _quadratic(*problem.linearized(p, index + part), share, delta2)
        found = _lower(problem, local, p, damping, _robust(error[fit], delta2), fit, delta2)
        ticks.update()
        if found is None:
            break
        p, error, damping = found
        if _score(error[chosen]) < best_score:
            best, best_score = p, _score(error[chosen])
    return cast("Scheme", family.scheme(best))


def _lower(
    problem: _EndpointProblem, local: _Quadratic, p: Tensor, damping: float, value: float, fit: slice, delta2: Tensor
) -> tuple[Tensor, Tensor, float] | None:
    """(parameters, their errors, damping) whose objective on `fit` is below `value`; None if twelve dampings give none."""
    for _ in range(3):
        trials = [local.minimizer(p, damping * factor) for factor in DAMPING]
        found = [problem.errors(q) for q in trials]
        values = [math.inf if e is None else _robust(e[fit], delta2) for e in found]
        k = int(np.argmin(values))
        if values[k] < value:
            return trials[k], cast("Tensor", found[k]), max(damping * DAMPING[k], 1e-7)
        damping *= 100
    return None


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
