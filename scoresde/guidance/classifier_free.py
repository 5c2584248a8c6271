r"""Classifier-free guidance: a model that follows its condition more closely. Layer 3.

With the denoiser given the condition, $D(x, t, c)$, and without, $D(x, t)$,

$$D_w = D(x, t) + w\,(D(x, t, c) - D(x, t)),$$

which moves the conditional score by $(w - 1) \nabla_x \log p_t(c \mid x)$ (Ho & Salimans 2022, equation 6, where their weight is
$w - 1$). Within an interval of noise levels only, it costs less diversity (Kynkäänniemi et al. 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scoresde import checks
from scoresde.models.base import ScoreModel
from scoresde.models.wrapping import WrappedModel
from scoresde.sde import expand


class ClassifierFreeGuidance(WrappedModel):
    """A `ScoreModel` whose denoiser is D + w (D given cond - D), for every sampler and every likelihood.

    model: one whose network was trained with its condition dropped at times (`drop_cond` of the networks here).
    scale: w; 0 is the model without the condition, 1 with it, more than 1 follows it more closely.
    interval: noise levels sigma/alpha, (low, high), outside of which w = 1.
    unconditional: what stands for no condition, None by default; a tensor of one row, such as the label of no class, stands for
        every example.

    Each evaluation costs two of the network (one for w = 0 or 1). Without a `cond` it is the model itself. The probability
    flow of a guided model is well defined, but not that of any noised data: the log densities are those of what it samples
    by "ode". Raises `ValueError` for a scale that is not finite or an empty interval.
    """

    def __init__(
        self,
        model: ScoreModel,
        scale: float,
        *,
        interval: tuple[float, float] | None = None,
        unconditional: Any = None,
    ):
        super().__init__(model)
        self.scale = checks.number(scale, "scale")
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            raise ValueError(f"interval must be (low, high) noise levels with 0 <= low < high, got {interval}.")
        self.interval = None if interval is None else (float(interval[0]), float(interval[1]))
        self.unconditional = unconditional

    def _without(self, batch: int) -> Any:
        given = self.unconditional
        if not isinstance(given, Tensor):
            return given
        if given.dim() and given.shape[0] != 1:
            raise ValueError(f"unconditional must be None, one number or one row, got shape {tuple(given.shape)}.")
        return given.expand(batch, *given.shape[1:])

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        if cond is None or (self.scale == 1.0):
            return self.model.denoise(x, t, cond)
        without = self._without(x.shape[0])
        if self.scale == 0.0 and self.interval is None:
            return self.model.denoise(x, t, without)
        base, given = self.model.denoise(x, t, without), self.model.denoise(x, t, cond)
        if self.interval is None:
            return torch.lerp(base, given, self.scale)
        t = self.time_of(t, x)
        low, high = (-2 * math.log(max(level, 1e-300)) for level in self.interval)
        log_snr = self.sde.log_snr(t)
        weight = torch.where((log_snr <= low) & (log_snr >= high), self.scale, 1.0)
        return base + expand(weight, x) * (given - base)
