"""The public names and where they are defined; `scoresde` takes them from here when the first is asked for."""

# ruff: noqa: F401 (`scoresde.__all__` lists them)

from scoresde.checks import NonFiniteError
from scoresde.distill import tune
from scoresde.guidance import ClassifierFreeGuidance, Clipped
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
    sample_with_log_prob,
)
from scoresde.losses import denoising_loss
from scoresde.models.base import ScoreModel
from scoresde.models.mixture import DiffusedMixture, GaussianMixture
from scoresde.models.network import NoiseLabel, ScoreNet
from scoresde.models.quantized import QuantizedScoreNet
from scoresde.samplers.registry import METHODS
from scoresde.sampling import sample
from scoresde.sde import EDMSDE, SDE, VESDE, VPSDE, CosineSDE, DiscreteVPSDE, RectifiedFlow, SubVPSDE
