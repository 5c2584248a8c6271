"""Training on one device or many."""

from scoresde.train.checkpoint import options_of
from scoresde.train.loop import Result, TrainingInterrupted, TrainingStopped, build_model, load_splits, train
from scoresde.train.options import TRAIN_PRESETS, TrainOptions

__all__ = [
    "TRAIN_PRESETS",
    "Result",
    "TrainOptions",
    "TrainingInterrupted",
    "TrainingStopped",
    "build_model",
    "load_splits",
    "options_of",
    "train",
]
