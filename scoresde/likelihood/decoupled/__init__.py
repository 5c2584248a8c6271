"""Likelihoods by the trajectory first and its divergence afterwards: trajectory, quadrature, refinement, survey."""

from scoresde.likelihood.decoupled.quadrature import FlowTrajectory, LikelihoodPlan
from scoresde.likelihood.decoupled.trajectory import AngleWarp

__all__ = ["AngleWarp", "FlowTrajectory", "LikelihoodPlan"]
