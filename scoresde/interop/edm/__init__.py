"""Checkpoints of EDM; `snapshot` reads NVIDIA's pickles without running what is in them."""

from scoresde.interop.edm.checkpoint import STATE_FILES, is_state, load_edm
from scoresde.interop.edm.snapshot import network_of, read_pickle

__all__ = ["STATE_FILES", "is_state", "load_edm", "network_of", "read_pickle"]
