"""Exact likelihood: traces, log densities, bits/dim."""

from scoresde.likelihood.bits import BitsPerDim, bits_from_nats, bits_per_dim
from scoresde.likelihood.ddpm import DDPMBound, ddpm_bound
from scoresde.likelihood.decoupled.quadrature import LikelihoodPlan
from scoresde.likelihood.decoupled.survey import plan_likelihood
from scoresde.likelihood.decoupled.trajectory import AngleWarp
from scoresde.likelihood.density import LogProb, log_prob, sample_with_log_prob
from scoresde.likelihood.dequantization import (
    Dequantizer,
    TruncatedNormalDequantizer,
    UniformDequantizer,
    VariationalDequantizer,
    dequantize,
    looks_quantized,
    quantize,
)
from scoresde.likelihood.divergence import Divergence, Exact, Hadamard, Hutchinson, HutchPlusPlus, default_divergence
from scoresde.likelihood.variational import elbo

__all__ = [
    "AngleWarp",
    "BitsPerDim",
    "DDPMBound",
    "Dequantizer",
    "Divergence",
    "Exact",
    "Hadamard",
    "HutchPlusPlus",
    "Hutchinson",
    "LikelihoodPlan",
    "LogProb",
    "TruncatedNormalDequantizer",
    "UniformDequantizer",
    "VariationalDequantizer",
    "bits_from_nats",
    "bits_per_dim",
    "ddpm_bound",
    "default_divergence",
    "dequantize",
    "elbo",
    "log_prob",
    "looks_quantized",
    "plan_likelihood",
    "quantize",
    "sample_with_log_prob",
]
