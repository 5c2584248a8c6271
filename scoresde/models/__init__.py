"""Models: the denoiser that everything else asks, and what is one."""

from scoresde.models.base import ScoreModel, check_input, require_model
from scoresde.models.mixture import DiffusedMixture, GaussianMixture
from scoresde.models.network import PARAMETERIZATIONS, NoiseLabel, ScoreNet
from scoresde.models.prepared import PreparedModel, PreparedNet
from scoresde.models.quantized import QuantizedScoreNet
from scoresde.models.wrapping import WrappedModel

__all__ = [
    "PARAMETERIZATIONS",
    "DiffusedMixture",
    "GaussianMixture",
    "NoiseLabel",
    "PreparedModel",
    "PreparedNet",
    "QuantizedScoreNet",
    "ScoreModel",
    "ScoreNet",
    "WrappedModel",
    "check_input",
    "require_model",
]
