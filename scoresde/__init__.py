"""Continuous-time score-based generative models: SDEs, samplers and exact likelihoods.

from scoresde import GaussianMixture, VPSDE, sample, log_prob

model = GaussianMixture.isotropic([[-1.0, 0.0], [1.0, 0.0]], std=0.2).diffuse(VPSDE())
x = sample(model, (1000, 2), method="ode", seed=0)
nats = log_prob(model, x).value
"""

# ruff: noqa: F405 (the names are those of scoresde._api)

from typing import TYPE_CHECKING, Any

from scoresde._version import __version__

if TYPE_CHECKING:
    from scoresde._api import *  # noqa: F403

__all__ = [
    "EDMSDE",
    "METHODS",
    "SDE",
    "VESDE",
    "VPSDE",
    "BitsPerDim",
    "ClassifierFreeGuidance",
    "Clipped",
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
    "sample_with_log_prob",
    "save_pretrained",
    "slerp",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import the package's rooms, and torch with them, when a public name is first used: seconds that `import scoresde` and
    the start of the command line do without."""
    if name not in __all__:
        raise AttributeError(f"module 'scoresde' has no attribute {name!r}")
    from importlib import import_module

    found = import_module("scoresde._api")
    globals().update({n: getattr(found, n) for n in __all__ if n not in globals()})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
