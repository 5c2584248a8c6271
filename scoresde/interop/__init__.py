"""Checkpoints, ours and other people's."""

from __future__ import annotations

import os
from typing import Any

from scoresde.model import ScoreModel
from scoresde.store import load_model


def load(path_or_hub_id: str | os.PathLike[str], *, config: Any = None) -> ScoreModel:
    """A `ScoreModel` from a folder or file written by this package (a model, a checkpoint or a training run).

    `config` is for checkpoints that do not carry their options; ours do, so it has to be None. Raises
    `FileNotFoundError` where there is no model and `ValueError` for a damaged or foreign file, saying what it is.
    """
    if config is not None:
        raise ValueError("config= is for checkpoints without options of their own; a scoresde model carries its own.")
    return load_model(path_or_hub_id)


__all__ = ["load"]
