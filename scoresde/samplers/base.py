r"""What a sampler is, and the one loop that runs them all.

Layer 3. A sampler takes x at time t to x at an earlier time s < t. Most of the literature's first-order samplers are
affine in the state, the denoiser and fresh noise,

$$x_s = A\,x_t + B\,D(x_t, t) + C\,z, \qquad z \sim N(0, I),$$

with three numbers per step that follow from alpha and sigma, so a method is a formula for (A, B, C). They are
computed once per solve, in float64, for the whole grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from scoresde import checks
from scoresde.grids import Grid, spread_of, takes_spread, uniform_time
from scoresde.models.base import ScoreModel
from scoresde.models.prepared import PreparedModel
from scoresde.progress import bar
from scoresde.rng import RandomSource
from scoresde.samplers.brownian import PathNoise
from scoresde.sde import SDE

Row = TypeVar("Row")


@dataclass
class State(Generic[Row]):
    """What one solve carries from step to step.

    `rows`: the numbers of every step, one row a step, of the kind that the sampler names (`row_type`): rows[i] belongs to the step
    from times[i] to times[i + 1]. `Sampler.start` makes them, `Sampler.step` asks for its own with `Sampler.row`.
    `index`: the step that is next. `memory`: what a method remembers of earlier steps, if anything.
    """

    times: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    memory: Any = None
    index: int = 0


class Sampler(ABC, Generic[Row]):
    """Takes x from time t to an earlier time s.

    Attributes: `stochastic`, whether its steps draw noise; `adaptive`, whether it chooses steps of its own within an interval of
    the grid; `row_type`, the tuple that holds one step's numbers; `default_steps`; `grid`, the time grid used unless another
    is given; `denoise_final`, whether the loop ends with the denoiser at t_min in place of x (one more evaluation: it removes the
    noise that is left there); `nfe_per_step`, evaluations of the network per step (None: as many as its tolerances need);
    `convergence_order`, that of the endpoint's error in the step size on smooth grids, for deterministic methods of fixed
    steps; `saved_at_zero`, evaluations that a step which ends at sigma = 0 does without; `solve_options`, the options of
    `scoresde.flow.solve_flow` where the sampler is that solve, so that its samples can come with their log densities.
    """

    stochastic: bool = True
    adaptive: bool = False
    row_type: Callable[..., Any] = tuple
    default_steps: int = 100
    nfe_per_step: int | None = 1
    grid: Grid = staticmethod(uniform_time)
    denoise_final: bool = True
    convergence_order: int | None = None
    saved_at_zero: int = 0
    solve_options: dict[str, Any] | None = None
    nfe: float  # of the last solve, where a sampler counts

    def times(
        self,
        model: ScoreModel,
        steps: int,
        t_max: float | None = None,
        event_shape: Sequence[int] | None = None,
    ) -> Tensor:
        """The decreasing float64 times of a solve of `steps` steps, from `t_max` where it is given.

        `event_shape`: of one example, for grids that depend on it, where the model does not say it itself.
        """
        options: dict[str, Any] = {} if t_max is None else {"t_max": t_max}
        if takes_spread(self.grid):
            options["spread"] = data_spread(model, event_shape)
        return self.grid(model.sde, steps, **options)

    def on_given_grid(self) -> Sampler:
        """The sampler that runs on a grid of the caller's: itself, unless its formulas belong to times of its own."""
        return self

    def start(self, model: ScoreModel, times: Tensor) -> State[Row]:
        """The state before the first step of a solve through `times` (N + 1,)."""
        return State(times.tolist(), self.rows(model, times))

    def rows(self, model: ScoreModel, times: Tensor) -> list[Row]:
        """The row of every step of `times` (N + 1,), from `columns`, computed at once. Raises `ValueError` if one is not finite."""
        t, s = times[:-1], times[1:]
        columns = [c.tolist() for c in self.columns(model, t, s)]
        rows = list(zip(*columns, strict=True)) if columns else [()] * t.numel()
        for i, row in enumerate(rows):
            if not all(map(math.isfinite, row)):
                raise undefined(self, model.sde, float(t[i]), float(s[i]))
        return list(map(getattr(self.row_type, "_make", tuple), rows))

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        """The numbers that a step from t to s needs, for vectors t and s (N,) in float64."""
        return ()

    def columns(self, model: ScoreModel, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        """`coefficients` as this sampler's rows hold them, which may fold the model's own into them."""
        return self.coefficients(model.sde, t, s)

    def row(self, model: ScoreModel, state: State[Row], t: float, s: float) -> Row:
        """The row of the step from t to s, usually the next of the solve in `state`.

        A step that continues the solve beyond its last time is added to it. Any other makes of `state` (which may be `State()`) a
        solve of this one step (`alone`).
        """
        i, times = state.index, state.times
        if not (i < len(state.rows) and times[i] == t and times[i + 1] == s):
            i = times.index(t) if t in times else -1
            if i >= 0 and i == len(times) - 1:
                state.rows.append(self.rows(model, torch.tensor([*times, s], dtype=torch.float64))[-1])
                times.append(s)
            elif i < 0 or times[i + 1] != s:
                vars(state).update(vars(self.alone(model, t, s)))
                i = 0
        state.index = i + 1
        return state.rows[i]

    def alone(self, model: ScoreModel, t: float, s: float) -> State[Row]:
        """The state of a step outside of any solve: that of a solve of one step."""
        return self.start(model, torch.tensor([t, s], dtype=torch.float64))

    @abstractmethod
    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: float,
        s: float,
        state: State,
        noise: RandomSource,
        cond: Any = None,
    ) -> Tensor:
        """x (B, *) at time t -> x at time s < t. Random numbers come from `noise` alone."""


class LinearRow(NamedTuple):
    """One step in terms of the network's raw output F: x_s = keep x_t + gain F + noise z."""

    keep: float
    gain: float
    noise: float


class LinearSampler(Sampler[LinearRow]):
    r"""A first-order step, affine in the state, the denoiser and noise. A subclass gives `coefficients`, the formula for (A, B, C):

    $$x_s = A\,x_t + B\,D(x_t, t) + C\,z .$$

    Every model's denoiser is affine in the network's raw output, D = p x + q F, so the step is taken as
    (A + B p) x + B q F + C z: two tensor operations beside the network.
    """

    row_type = LinearRow

    def columns(self, model: ScoreModel, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        """(A + B p, B q, C) for D = p x + q F."""
        a, b, c = self.coefficients(model.sde, t, s)
        p, q, _, _ = model.affine(t)
        return a + b * p, b * q, c

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        keep, gain, c = self.row(model, state, t, s)
        x = torch.mul(x, keep).add_(model.output(x, t, cond), alpha=gain)
        return x.add_(noise.normal(x.shape, x.dtype), alpha=c) if c else x


def data_spread(model: ScoreModel, event_shape: Sequence[int] | None = None) -> float:
    """`grids.spread_of` of the data of a model; one that does not know the shape of its examples, and is not told, has d = 1."""
    shape = model.event_shape if event_shape is None else event_shape
    return spread_of(model.sigma_data, shape or ())


def undefined(sampler: Sampler, sde: SDE, t: float, s: float) -> ValueError:
    """The error for a step whose numbers are not finite."""
    return ValueError(
        f"{type(sampler).__name__} is undefined for {type(sde).__name__} on the step from t = {t:g} to {s:g}; keep the grid "
        f"within [{sde.t_min:g}, {sde.t_max:g}]."
    )


def affine_at(model: ScoreModel | PreparedModel, t: float) -> tuple[float, float, float, float]:
    """(a, b, c, e) at one time as numbers: looked up in a prepared model, computed for another."""
    if isinstance(model, PreparedModel):
        return model.at(t)[:4]
    a, b, c, e = (float(v) for v in model.affine(torch.tensor(t, dtype=torch.float64)))
    return a, b, c, e


def add_times(model: ScoreModel | PreparedModel, times: Tensor) -> None:
    """Tell a prepared model of evaluations at float64 `times` (N,) that are not on the grid."""
    if isinstance(model, PreparedModel):
        model.add_times(times)


def transition(sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The exact forward transition from s to t > s: x_t = a x_s + sqrt(v) z; returns (a, v)."""
    a = sde.alpha(t) / sde.alpha(s)
    return a, (sde.sigma(t) ** 2 - (a * sde.sigma(s)) ** 2).clamp_min(0)


@dataclass
class Trajectory:
    """States along a solve: `times` (N + 1,) and `states`, one (B, *) tensor per time, the first at t_max."""

    times: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def __call__(self, t: float, x: Tensor) -> None:
        self.times.append(t)
        self.states.append(x.clone())


def run(
    sampler: Sampler,
    model: ScoreModel,
    x: Tensor,
    times: Tensor,
    noise: RandomSource,
    *,
    cond: Any = None,
    progress: bool = False,
    trajectory: Callable[[float, Tensor], None] | None = None,
    denoise_final: bool | None = None,
    compile: bool = False,
) -> Tensor:
    """The loop of every sampler: x (B, *) from times[0] to times[-1], then the final denoiser.

    Raises `NonFiniteError` naming step, t and samples if NaN or infinity appear; on a GPU this is read once, after
    the loop, so that no step waits for the host.
    """
    steps = times.numel() - 1
    model = cast("ScoreModel", model.prepare(x, times, compile=compile))  # which stands for the model
    state = sampler.start(model, times)
    points = times.tolist()
    watch = _Watch(x.device)
    path = noise if isinstance(noise, PathNoise) else None
    final = int(sampler.denoise_final if denoise_final is None else denoise_final)
    if trajectory is not None:
        trajectory(points[0], x)
    with bar(steps + final, "sampling", "step", progress) as ticks:
        for i in range(steps + final):
            if i < steps:
                if path is not None:
                    path.advance(points[i], points[i + 1])
                x = _same(sampler.step(model, x, points[i], points[i + 1], state, noise, cond), x, sampler)
            else:
                x = model.denoise(x, points[-1], cond)
            watch.look(x, i, points[i])
            if trajectory is not None:
                trajectory(points[min(i + 1, steps)], x)
            ticks.update()
    watch.read(x)
    return x


def _same(x: Tensor, before: Tensor, sampler: Sampler) -> Tensor:
    """x after a step; a sampler that returns something else than a state of the same kind is stopped."""
    if not isinstance(x, Tensor) or x.shape != before.shape or x.dtype != before.dtype:
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{type(sampler).__name__}.step must return a tensor of shape {tuple(before.shape)} and {before.dtype}, got {got}."
        )
    return x


class _Watch:
    """Notices NaN and infinity from one sum per step, read every few steps on a CPU and after the loop elsewhere."""

    every = 16

    def __init__(self, device: torch.device):
        self.patience = self.every if device.type == "cpu" else math.inf  # a device that runs ahead is never waited for
        self.seen: list[tuple[int, float]] = []
        self.sums: list[Tensor] = []

    def look(self, x: Tensor, step: int, t: float) -> None:
        self.seen.append((step, t))
        self.sums.append(x.sum())  # finite if every entry is; a NaN or infinity stays in its row until the end
        if len(self.sums) >= self.patience:
            self.read(x)

    def read(self, x: Tensor) -> None:
        if not self.sums:
            return
        finite = torch.isfinite(torch.stack(self.sums))
        if not bool(finite.all()):
            self._fail(x, *self.seen[int((~finite).nonzero()[0])])
        self.seen.clear()
        self.sums.clear()

    @staticmethod
    def _fail(x: Tensor, step: int, t: float) -> None:
        rows = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
        if not rows:  # finite entries whose sum overflows
            return
        raise checks.NonFiniteError(
            f"NaN or infinity in step {step}, which began at t = {t:.6g}, in {len(rows)} of {x.shape[0]} samples, "
            f"rows {checks.rows_text(rows)}. Check the network from that t on; if it is finite there, use more steps, and if it "
            "predicts the noise and the schedule ends with almost no signal, clip the denoiser: Clipped(model)."
        )
