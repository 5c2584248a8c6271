"""The names of `sample(method=...)`: the one place that picks a sampler by string. Layer 3."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from scoresde import checks
from scoresde.grids import balanced, uniform_log_snr
from scoresde.samplers.backends import ScipyRK45, TorchDiffEq, TorchSDE
from scoresde.samplers.base import Sampler
from scoresde.samplers.corrector import AnnealedLangevin, PredictorCorrector
from scoresde.samplers.exponential import Data, ErSde, Tau
from scoresde.samplers.few_step import FewStep
from scoresde.samplers.heun import Heun, StochasticHeun
from scoresde.samplers.linear import DDIM, Ancestral, EulerMaruyama, FlowEuler, ReverseDiffusion
from scoresde.samplers.multistep import Multistep
from scoresde.samplers.ode import ProbabilityFlow
from scoresde.samplers.singlestep import Singlestep

METHODS: dict[str, Callable[[], Sampler]] = {
    # stochastic
    "pc": PredictorCorrector,
    "euler": EulerMaruyama,
    "reverse-diffusion": ReverseDiffusion,
    "ancestral": Ancestral,
    "langevin": AnnealedLangevin,
    "edm": StochasticHeun,
    "sde-dpm++2m": partial(Multistep, Data(Tau()), 2, pair="midpoint", grid=uniform_log_snr, default_steps=50),
    "sde-dpm++3m": partial(Multistep, Data(Tau()), 3, grid=uniform_log_snr, default_steps=50),
    "sa-solver": partial(Multistep, Data(Tau(1.0, 0.05, 1.0)), 3, corrector=3, grid=uniform_log_snr, default_steps=50),
    "er-sde": partial(Multistep, Data(ErSde()), 3, variable="ratio", grid=uniform_log_snr, default_steps=50),
    "sde": TorchSDE,
    # deterministic, a fixed number of steps
    "auto": FewStep,
    "flow-euler": FlowEuler,
    "ddim": DDIM,
    "heun": Heun,
    "dpm2": partial(Singlestep, "noise", "midpoint"),
    "dpm3": partial(Singlestep, "noise", "third"),
    "dpm++2s": partial(Singlestep, "data", "midpoint"),
    "dpm++": partial(Multistep, "data", 2, pair="midpoint"),
    "dpm++2m": partial(Multistep, "data", 2, pair="midpoint"),
    "dpm++3m": partial(Multistep, "data", 3, grid=partial(balanced, rho=14.0)),
    "unipc2": partial(Multistep, "data", 2, corrector=3, pair="midpoint"),
    "unipc3": partial(Multistep, "data", 3, corrector=4, pair="midpoint", grid=partial(balanced, rho=14.0)),
    "deis": partial(Multistep, "noise", 3, variable="time", grid=partial(balanced, rho=3.0)),
    "ipndm": partial(Multistep, "noise", 4, variable="index"),
    "lms": partial(Multistep, "noise", 3, variable="ratio", grid=partial(balanced, rho=3.0)),
    "adams-noise": partial(Multistep, "noise", 3, grid=partial(balanced, rho=4.0)),
    "adams-angle": partial(Multistep, "angle", 3),
    # deterministic, adaptive
    "ode": ProbabilityFlow,
    "torchdiffeq": TorchDiffEq,
    "rk45": ScipyRK45,
}


def sampler_for(method: str | Sampler) -> Sampler:
    """The sampler behind a name of `METHODS`, with its defaults, or the given object itself."""
    if isinstance(method, Sampler):
        return method
    if isinstance(method, type) and issubclass(method, Sampler):
        raise TypeError(f"method is the class {method.__name__}; pass an object, {method.__name__}(...).")
    return METHODS[checks.choice(method, METHODS, "sampling method")]()
