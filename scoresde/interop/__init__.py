"""Checkpoints, ours and other people's: `load` recognises what a file is; each kind also by name."""

from scoresde.interop.diffusers import load_diffusers
from scoresde.interop.edm import load_edm
from scoresde.interop.edm.snapshot import network_of, read_pickle
from scoresde.interop.ours.hub import from_pretrained, push_to_hub, save_pretrained
from scoresde.interop.recognise import load
from scoresde.interop.score_sde import load_score_sde
from scoresde.interop.wrap import WrappedNet

__all__ = [
    "WrappedNet",
    "from_pretrained",
    "load",
    "load_diffusers",
    "load_edm",
    "load_score_sde",
    "network_of",
    "push_to_hub",
    "read_pickle",
    "save_pretrained",
]
