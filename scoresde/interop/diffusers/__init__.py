"""Models of the diffusers library, and (in `scheduler`, which needs it) our samplers for its pipelines."""

from scoresde.interop.diffusers.folder import data_of, is_diffusers, is_weights, load_diffusers
from scoresde.interop.diffusers.schedules import betas_of, process_of_scheduler

__all__ = ["betas_of", "data_of", "is_diffusers", "is_weights", "load_diffusers", "process_of_scheduler"]
