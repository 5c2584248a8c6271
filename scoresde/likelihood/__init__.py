"""Exact likelihood: traces, log densities, bits/dim."""

from scoresde.likelihood.bits import BitsPerDim, bits_from_nats, bits_per_dim
from scoresde.likelihood.curve import Stretch
from scoresde.likelihood.ddpm import DDPMBound, ddpm_bound
from scoresde.likelihood.decoupled import Plan
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
from scoresde.likelihood.elbo import elbo
from scoresde.likelihood.log_prob import LogProb, log_prob
from scoresde.likelihood.plan import plan_likelihood

__all__ = [
    "BitsPerDim",
    "DDPMBound",
    "Dequantizer",
    "Divergence",
    "Exact",
    "Hadamard",
    "HutchPlusPlus",
    "Hutchinson",
    "LogProb",
    "Plan",
    "Stretch",
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
]
