"""Samplers: objects that take x from one time to an earlier one, and the loop that runs them."""

from scoresde.samplers.backends import ScipyRK45, TorchDiffEq, TorchSDE
from scoresde.samplers.base import LinearSampler, Sampler, State, Trajectory, run, transition
from scoresde.samplers.brownian import BrownianPath, PathNoise
from scoresde.samplers.corrector import AnnealedLangevin, Langevin, PredictorCorrector
from scoresde.samplers.exponential import Angle, Data, ErSde, Noise, Prediction, Tau
from scoresde.samplers.few_step import FewStep, Scheme
from scoresde.samplers.heun import Heun, StochasticHeun
from scoresde.samplers.linear import DDIM, Ancestral, EulerMaruyama, FlowEuler, Hold, ReverseDiffusion
from scoresde.samplers.multistep import Multistep
from scoresde.samplers.ode import ProbabilityFlow
from scoresde.samplers.registry import METHODS, sampler_for
from scoresde.samplers.setup import steps_within, time_grid
from scoresde.samplers.singlestep import Singlestep

__all__ = [
    "DDIM",
    "METHODS",
    "Ancestral",
    "Angle",
    "AnnealedLangevin",
    "BrownianPath",
    "Data",
    "ErSde",
    "EulerMaruyama",
    "FewStep",
    "FlowEuler",
    "Heun",
    "Hold",
    "Langevin",
    "LinearSampler",
    "Multistep",
    "Noise",
    "PathNoise",
    "Prediction",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseDiffusion",
    "Sampler",
    "Scheme",
    "ScipyRK45",
    "Singlestep",
    "State",
    "StochasticHeun",
    "Tau",
    "TorchDiffEq",
    "TorchSDE",
    "Trajectory",
    "run",
    "sampler_for",
    "steps_within",
    "time_grid",
    "transition",
]
