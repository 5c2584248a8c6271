"""Guidance: models that follow a condition more closely. Each wraps a `ScoreModel` and is one."""

from scoresde.guidance.classifier_free import ClassifierFreeGuidance

__all__ = ["ClassifierFreeGuidance"]
