"""Models around models: a condition followed more closely, a denoiser held to the data. Each is a `ScoreModel`."""

from scoresde.guidance.classifier_free import ClassifierFreeGuidance
from scoresde.guidance.clipped import Clipped

__all__ = ["ClassifierFreeGuidance", "Clipped"]
