"""Exact likelihood: traces, log densities, bits/dim."""

from scoresde.likelihood.bits import BitsPerDim, bits_from_nats, bits_per_dim, dequantize, quantize
from scoresde.likelihood.divergence import Divergence, Exact, Hadamard, Hutchinson, HutchPlusPlus
from scoresde.likelihood.elbo import elbo
from scoresde.likelihood.log_prob import LogProb, default_divergence, log_prob

__all__ = [
    "BitsPerDim",
    "Divergence",
    "Exact",
    "Hadamard",
    "HutchPlusPlus",
    "Hutchinson",
    "LogProb",
    "bits_from_nats",
    "bits_per_dim",
    "default_divergence",
    "dequantize",
    "elbo",
    "log_prob",
    "quantize",
]
