"""Where `SamplerScheduler` was first; it now stands in `scoresde.interop.diffusers.scheduler`. Needs diffusers."""

from scoresde.interop.diffusers.scheduler import SamplerScheduler

__all__ = ["SamplerScheduler"]
