"""Checkpoints of score_sde_pytorch: U-Nets and the RefineNets of NCSN."""

from scoresde.interop.score_sde.checkpoint import build_score_sde, is_checkpoint, load_score_sde
from scoresde.interop.score_sde.published import PUBLISHED

__all__ = ["PUBLISHED", "build_score_sde", "is_checkpoint", "load_score_sde"]
