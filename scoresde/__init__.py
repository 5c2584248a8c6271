"""Continuous-time score-based generative models: SDEs, samplers and exact likelihoods.

from scoresde import GaussianMixture, VPSDE, sample, log_prob

model = GaussianMixture.isotropic([[-1.0, 0.0], [1.0, 0.0]], std=0.2).diffuse(VPSDE())
x = sample(model, (1000, 2), method="ode", seed=0)
nats = log_prob(model, x).value
"""

from scoresde._version import __version__
from scoresde.checks import NonFiniteError
from scoresde.distill import tune
from scoresde.guidance import ClassifierFreeGuidance
from scoresde.interop import WrappedNet, from_pretrained, load, push_to_hub, save_pretrained
from scoresde.latents import decode, encode, interpolate, round_trip, slerp
from scoresde.likelihood import (
    BitsPerDim,
    DDPMBound,
    Divergence,
    Exact,
    Hadamard,
    Hutchinson,
    HutchPlusPlus,
    LogProb,
    VariationalDequantizer,
    bits_per_dim,
    ddpm_bound,
    elbo,
    log_prob,
    plan_likelihood,
)
from scoresde.losses import denoising_loss
from scoresde.models.base import ScoreModel
from scoresde.models.mixture import DiffusedMixture, GaussianMixture
from scoresde.models.network import NoiseLabel, ScoreNet
from scoresde.models.quantized import QuantizedScoreNet
from scoresde.samplers.registry import METHODS
from scoresde.sampling import sample
from scoresde.sde import EDMSDE, SDE, VESDE, VPSDE, CosineSDE, DiscreteVPSDE, RectifiedFlow, SubVPSDE

__all__ = [
    "EDMSDE",
    "METHODS",
    "SDE",
    "VESDE",
    "VPSDE",
    "BitsPerDim",
    "ClassifierFreeGuidance",
    "CosineSDE",
    "DDPMBound",
    "DiffusedMixture",
    "DiscreteVPSDE",
    "Divergence",
    "Exact",
    "GaussianMixture",
    "Hadamard",
    "HutchPlusPlus",
    "Hutchinson",
    "LogProb",
    "NoiseLabel",
    "NonFiniteError",
    "QuantizedScoreNet",
    "RectifiedFlow",
    "ScoreModel",
    "ScoreNet",
    "SubVPSDE",
    "VariationalDequantizer",
    "WrappedNet",
    "__version__",
    "bits_per_dim",
    "ddpm_bound",
    "decode",
    "denoising_loss",
    "elbo",
    "encode",
    "from_pretrained",
    "interpolate",
    "load",
    "log_prob",
    "plan_likelihood",
    "push_to_hub",
    "round_trip",
    "sample",
    "save_pretrained",
    "slerp",
    "tune",
]

# methods where people look for them; the model itself, far below, knows nothing of files
ScoreModel.save_pretrained = save_pretrained
ScoreModel.push_to_hub = push_to_hub
ScoreModel.from_pretrained = staticmethod(from_pretrained)
