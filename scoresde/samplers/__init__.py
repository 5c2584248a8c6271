"""Samplers: objects that take x from one time to an earlier one, and the loop that runs them."""

from scoresde.samplers.base import LinearSampler, Sampler, State, Trajectory, run, time_grid, transition
from scoresde.samplers.corrector import Langevin, PredictorCorrector
from scoresde.samplers.heun import Heun
from scoresde.samplers.linear import DDIM, Ancestral, EulerMaruyama, ReverseDiffusion
from scoresde.samplers.ode import ProbabilityFlow

__all__ = [
    "DDIM",
    "Ancestral",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "LinearSampler",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseDiffusion",
    "Sampler",
    "State",
    "Trajectory",
    "run",
    "time_grid",
    "transition",
]
