r"""Samplers that hand the solve to another library: torchsde, torchdiffeq, SciPy.

Layer 3. In the plain time t of Song et al. 2021, the reverse SDE (their equation 6, after Anderson 1982) and the
probability flow (equation 13),

$$dx = [f x - g^2 \nabla\log p_t]\,dt + g\,d\bar w, \qquad dx = [f x - \tfrac12 g^2 \nabla\log p_t]\,dt,$$

both solved from larger to smaller t. They are here for comparison with published numbers and for the schemes of those
libraries; `ProbabilityFlow` takes fewer evaluations for the same accuracy and keeps the samples of a batch apart. Each
library is imported when a sampler that needs it is made.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import checks
from scoresde.models.base import ScoreModel
from scoresde.rng import RandomSource
from scoresde.samplers.base import Sampler, State
from scoresde.samplers.brownian import BrownianPath
from scoresde.samplers.ode import whole_path
from scoresde.sde import SDE

# scheme of torchsde -> the calculus it is written for (with noise that does not depend on x both mean the same), and
# evaluations of the network per step
SCHEMES = {
    "euler": ("ito", 1),
    "milstein": ("ito", 1),
    "srk": ("ito", 2),
    "euler_heun": ("stratonovich", 1),
    "heun": ("stratonovich", 2),
    "midpoint": ("stratonovich", 2),
    "log_ode": ("stratonovich", 2),
}
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
# evaluations per step; None where the method looks back and begins otherwise
FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "explicit_adams": None, "implicit_adams": None}
EXPLICIT = ("RK45", "RK23", "DOP853")
PIECES = 8  # of a step, for the time integral of the Brownian path
MAX_STEPS = 100_000


def _library(name: str, user: str) -> ModuleType:
    """The module `name`; `ImportError` saying what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        package = name.partition(".")[0]
        raise ImportError(f"{user} needs the package {package}; install it with: pip install {package}") from e


def _require_finite(value: Tensor, t: float) -> Tensor:
    """`value`; `NonFiniteError` naming t and the rows if it holds NaN or infinity, on which adaptive solvers would hang."""
    ok = torch.isfinite(value).flatten(1).all(1)
    if not bool(ok.all()):
        rows = (~ok).nonzero().flatten().tolist()
        raise checks.NonFiniteError(
            f"NaN or infinity in the step at t = {t:.6g}, in {len(rows)} of {value.shape[0]} samples, "
            f"rows {checks.rows_text(rows)}. Check the network's output at that t."
        )
    return value


# -- the reverse SDE -------------------------------------------------------------------------------------------------


class RatesRow(NamedTuple):
    """The reverse SDE at one time, towards smaller t: dx = (pull x + gain D) dt + noise dw."""

    pull: float
    gain: float
    noise: float


@dataclass
class _Solve:
    """What the intervals of one solve share: its ends, the SDE by time, and the Brownian path."""

    low: float
    high: float
    rates: dict[float, RatesRow] = field(default_factory=dict)
    path: BrownianPath | None = None


class TorchSDE(Sampler[RatesRow]):
    r"""The reverse SDE by a scheme of torchsde, driven by a path that does not change when the steps do:

    $$dx = \left[f x - g^2\,\nabla\log p_t(x)\right] dt + g\,d\bar w .$$

    Arguments: `scheme`: "euler", "milstein", "srk" (Ito), "euler_heun", "heun", "midpoint" or "log_ode"
    (Stratonovich); g does not depend on x, so that both calculi mean the same process. `adaptive`: let torchsde choose
    the steps within an interval of the grid (one interval by default) for the tolerances `rtol` and `atol`; its steps
    are then shared by the batch, so that a sample depends on its batch-mates. Otherwise every interval is one step,
    and a sample depends on its own seed alone.

    Runs with one seed see the same Brownian path (`BrownianPath`, from t_min to t_max) whatever the grid, so they
    converge to one endpoint as the steps are refined: with order 1, since the noise is additive. "srk" has a much
    smaller error where the coefficients are smooth, since it also uses the time integral of the path; that is taken by
    the trapezoidal rule over 8 parts of the step, and each step asks for 8 increments. With additive noise "milstein"
    is "euler" and "log_ode" is "midpoint".

    `nfe` counts evaluations of the network in the last solve, of the whole batch. Raises `ImportError` without
    torchsde, `ValueError` for another scheme, and `NonFiniteError` if NaN or infinity appear.
    Reference: Li et al. 2020, "Scalable gradients for stochastic differential equations" (torchsde).
    """

    row_type = RatesRow

    def __init__(self, scheme: str = "euler", *, adaptive: bool = False, rtol: float = 1e-3, atol: float = 1e-3):
        self.scheme = checks.choice(scheme, SCHEMES, "scheme of torchsde")
        self.calculus, self.nfe_per_step = SCHEMES[scheme]
        self.adaptive = bool(adaptive)
        if adaptive:
            self.nfe_per_step = None
        self.rtol = checks.positive(rtol, "rtol")
        self.atol = checks.positive(atol, "atol")
        self.default_steps = 1 if adaptive else 500
        self.nfe = 0
        _library("torchsde", type(self).__name__)

    def start(self, model: ScoreModel, times: Tensor) -> State[RatesRow]:
        self.nfe = 0
        state = super().start(model, times)
        state.memory = _Solve(float(times[-1]), float(times[0]), dict(zip(state.times, state.rows, strict=False)))
        return state

    def coefficients(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return _rates(sde, t)

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        if x.shape[0] == 0:
            return x
        solve = state.memory
        if solve is None or not solve.low <= s < t <= solve.high:  # a step outside the loop
            solve = state.memory = _Solve(s, t)
        if solve.path is None:
            shape = x.flatten(1).shape
            solve.path = BrownianPath(shape, noise, solve.low, solve.high, dtype=x.dtype)
        length = t - s
        # torchsde draws a random number to look at shapes: its caller's random state is none of our business
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            y = _library("torchsde", type(self).__name__).sdeint(
                _Reverse(self, model, x.shape, (s, t), solve.rates, cond),
                x.flatten(1),
                torch.tensor([-t, -s], dtype=torch.float64),
                bm=_Motion(solve.path, "foster" if self.scheme == "log_ode" else "space-time"),
                method=self.scheme,
                dt=length / 100 if self.adaptive else length * (1 + 1e-9),  # one step, whatever the rounding
                dt_min=length * 1e-5,
                adaptive=self.adaptive,
                rtol=self.rtol,
                atol=self.atol,
            )
        return y[-1].reshape(x.shape)


def _rates(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of `RatesRow`: -[f x - g^2 score] = a x + b D with b = g^2 alpha/sigma^2."""
    g = sde.diffusion(t)
    pull = (g / sde.sigma(t)) ** 2
    return -(sde.drift_scale(t) + pull), pull * sde.alpha(t), g


class _Reverse:
    """The reverse SDE in torchsde's form: time runs upwards as -t, states are (B, d), noise is additive."""

    noise_type = "additive"

    def __init__(
        self,
        sampler: TorchSDE,
        model: ScoreModel,
        shape: torch.Size,
        ends: tuple[float, float],
        rates: dict[float, RatesRow],
        cond: Any,
    ):
        self.sde_type = sampler.calculus
        self.sampler, self.model, self.shape, self.cond = sampler, model, shape, cond
        self.ends, self.rates = ends, rates
        self.last: tuple[float, Tensor, Tensor] | None = None  # torchsde asks for the slope at a step's start twice

    def at(self, minus_t: Tensor) -> tuple[float, RatesRow]:
        """t, and the coefficients there."""
        t = min(max(-float(minus_t), self.ends[0]), self.ends[1])
        if t not in self.rates:
            values = _rates(self.model.sde, torch.tensor([t], dtype=torch.float64))
            self.rates[t] = RatesRow(*(float(v) for v in values))
        return t, self.rates[t]

    def f(self, minus_t: Tensor, y: Tensor) -> Tensor:
        t, (a, b, _) = self.at(minus_t)
        if self.last is None or self.last[0] != t or self.last[1] is not y:
            self.sampler.nfe += 1
            denoised = self.model.denoise(y.reshape(self.shape), t, self.cond)
            slope = torch.add(a * y, denoised.flatten(1), alpha=b)
            self.last = t, y, _require_finite(slope, t) if self.sampler.adaptive else slope
        return self.last[2]

    def g_prod(self, minus_t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.at(minus_t)[1][2] * v


class _Motion:
    """A `BrownianPath` under torchsde's calling convention, in the time -t."""

    def __init__(self, path: BrownianPath, levy_area_approximation: str):
        self.path, self.shape, self.levy_area_approximation = path, path.shape, levy_area_approximation

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        """W(tb) - W(ta); with `return_U` also U, the integral of W - W(ta) from ta to tb; A is not used by our noise."""
        start, end = -float(ta), -float(tb)
        if not return_U:
            w = self.path.increment(start, end)
            return (w, None) if return_A else w
        points = [start + (end - start) * k / PIECES for k in range(PIECES)] + [end]
        total: Tensor | float = 0.0
        u: Tensor | float = 0.0
        for p, q in pairwise(points):
            step = self.path.increment(p, q)
            u = u + (total + 0.5 * step)
            total = total + step
        return total, u * (abs(end - start) / PIECES)


# -- the probability flow --------------------------------------------------------------------------------------------


class _FlowBackend(Sampler[tuple[()]]):
    """The probability flow in t, one solve per interval of the grid, step sizes shared by the batch.

    What is solved for is x - alpha mu with the data's mean mu, where the model knows it (`data_mean`), so that tolerances do not
    depend on where the data are.
    """

    stochastic = False
    adaptive = True
    default_steps = 1
    nfe_per_step: int | None = None
    denoise_final = False
    grid = staticmethod(whole_path)
    nfe = 0

    def start(self, model: ScoreModel, times: Tensor) -> State:
        self.nfe = 0
        return super().start(model, times)

    def step(
        self, model: ScoreModel, x: Tensor, t: float, s: float, state: State, noise: RandomSource, cond: Any = None
    ) -> Tensor:
        t, s = min(t, model.flow_end), min(s, model.flow_end)
        if x.shape[0] == 0 or s == t:
            return x

        centre = 0.0 if model.data_mean is None else model.data_mean.to(x)

        def signal(time: float) -> Any:
            return float(model.sde.alpha(time)) * centre

        def slope(time: float, y: Tensor) -> Tensor:
            """dy/dt of y = x - alpha centre, at a time kept within the interval; the network never sees another."""
            self.nfe += 1
            time = min(max(time, s), t)
            rate = float(model.sde.alpha_dot(time)) * centre
            return _require_finite(model.velocity(y + signal(time), time, cond) - rate, time)

        return self.solve(slope, x - signal(t), t, s) + signal(s)

    @abstractmethod
    def solve(self, slope: Callable[[float, Tensor], Tensor], x: Tensor, t: float, s: float) -> Tensor:
        """x (B, *) at t -> x at s < t, for dx/dt = slope(t, x)."""


class TorchDiffEq(_FlowBackend):
    r"""The probability flow through `torchdiffeq.odeint`:

    $$\frac{dx}{dt} = f x - \tfrac12 g^2\,\nabla\log p_t(x) .$$

    Arguments: `method`: "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", which choose their steps for `rtol`
    and `atol`; or "euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams" with one step per
    interval of the grid. `options` go to torchdiffeq. The error norm is the root mean square over the whole batch:
    step sizes are shared, and a sample depends on its batch-mates within the tolerance. Adaptive solves end exactly at
    t_min and the network is never called outside [t_min, 1].

    `nfe` counts evaluations of the last solve. Raises `ImportError` without torchdiffeq, `ValueError` for another
    method, `NonFiniteError` if the network returns NaN, `RuntimeError` if torchdiffeq gives up.
    """

    def __init__(
        self, method: str = "dopri5", rtol: float = 1e-5, atol: float = 1e-5, options: dict[str, Any] | None = None
    ):
        self.method = checks.choice(method, (*ADAPTIVE, *FIXED), "method of torchdiffeq")
        self.adaptive = method in ADAPTIVE
        self.nfe_per_step = FIXED.get(method)
        self.rtol = checks.positive(rtol, "rtol")
        self.atol = checks.positive(atol, "atol")
        self.options = dict(options or {})
        self.default_steps = 1 if self.adaptive else 100
        _library("torchdiffeq", type(self).__name__)

    def solve(self, slope: Callable[[float, Tensor], Tensor], x: Tensor, t: float, s: float) -> Tensor:
        ends = torch.tensor([t, s], dtype=torch.float64, device=x.device)
        options = dict(self.options)
        if self.adaptive:  # by itself the last step would go past the end
            options = {"step_t": ends[1:], "max_num_steps": MAX_STEPS} | options
        odeint = _library("torchdiffeq", type(self).__name__).odeint
        try:
            return odeint(
                lambda time, y: slope(float(time), y),
                x,
                ends,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=options,
            )[-1]
        except AssertionError as e:  # its way of saying that the steps became too many or too small
            raise RuntimeError(
                f"torchdiffeq's {self.method} did not get from t = {t:.6g} to {s:.6g}: {e}. Loosen rtol and atol."
            ) from e


class ScipyRK45(_FlowBackend):
    """The black-box ODE sampler as published: `scipy.integrate.solve_ivp` on the flattened batch, in float64.

    Arguments: `rtol`, `atol` (1e-5 each in the paper); `method`: "RK45", "RK23" or "DOP853". The state travels to the CPU
    and back at every evaluation; the network sees it in the dtype of x. As published, one step size serves the whole
    batch, whose error is measured by a root mean square: a sample depends on its batch-mates within the tolerance.

    `nfe` counts evaluations of the last solve. Raises `ImportError` without SciPy, `ValueError` for another method,
    `NonFiniteError` if the network returns NaN, `RuntimeError` if SciPy gives up.
    Reference: Song et al. 2021, section 4.3 and appendix D.4.
    """

    def __init__(self, rtol: float = 1e-5, atol: float = 1e-5, method: str = "RK45"):
        self.method = checks.choice(method, EXPLICIT, "method of SciPy")
        self.rtol = checks.positive(rtol, "rtol")
        self.atol = checks.positive(atol, "atol")
        _library("scipy.integrate", type(self).__name__)

    def solve(self, slope: Callable[[float, Tensor], Tensor], x: Tensor, t: float, s: float) -> Tensor:
        def flat_slope(time: float, y: Any) -> Any:
            state = torch.from_numpy(y).reshape(x.shape).to(device=x.device, dtype=x.dtype)
            return slope(time, state).double().cpu().numpy().ravel()

        result = _library("scipy.integrate", type(self).__name__).solve_ivp(
            flat_slope, (t, s), x.double().cpu().numpy().ravel(), rtol=self.rtol, atol=self.atol, method=self.method
        )
        if not result.success:
            raise RuntimeError(
                f"SciPy's {self.method} did not get from t = {t:.6g} to {s:.6g}: {result.message} Loosen rtol and atol."
            )
        return torch.from_numpy(result.y[:, -1].copy()).reshape(x.shape).to(device=x.device, dtype=x.dtype)
