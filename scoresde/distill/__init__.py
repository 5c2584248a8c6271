"""Learning to sample with few network evaluations."""

from scoresde.distill.solver import tune

__all__ = ["tune"]
