"""Training on one device or many."""

from scoresde.train.checkpoint import options_of
from scoresde.train.defaults import options_for
from scoresde.train.loop import Result, TrainingInterrupted, TrainingStopped, train
from scoresde.train.options import TRAIN_PRESETS, TrainOptions
from scoresde.train.setup import build_model, load_splits

__all__ = [
    "TRAIN_PRESETS",
    "Result",
    "TrainOptions",
    "TrainingInterrupted",
    "TrainingStopped",
    "build_model",
    "load_splits",
    "options_for",
    "options_of",
    "train",
]
