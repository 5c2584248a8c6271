r"""A denoiser held within the range of the data. Layer 3.

$$D_c(x, t) = \min(\max(D(x, t), \mathrm{low}), \mathrm{high}),$$

entry by entry. $E[x_0 \mid x_t]$ lies within the data's range, but a network's need not: one that predicts the noise divides
its errors by alpha, and where hardly any signal is left (schedules of zero terminal signal-to-noise ratio) they throw the first
steps far away. Ho et al. 2020 clip so in their published code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scoresde import checks
from scoresde.models.base import ScoreModel
from scoresde.models.wrapping import WrappedModel


class Clipped(WrappedModel):
    """A `ScoreModel` whose denoiser is clipped to [low, high], for every sampler and every likelihood.

    low, high: the range; each the model's own `value_range` where it is None.

    The probability flow is that of the clipped denoiser, and so are the log densities: of what this model samples by "ode", not
    of what `model` does. Where an entry is clipped the denoiser has no gradient, hence no part in the flow's divergence beyond
    that of the drift. Raises `ValueError` unless low < high are finite numbers.
    """

    def __init__(self, model: ScoreModel, low: float | None = None, high: float | None = None):
        super().__init__(model)
        ends = self.value_range
        self.low, self.high = checks.value_range(
            (ends[0] if low is None else low, ends[1] if high is None else high), "the range (low, high)"
        )

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        return self.model.denoise(x, t, cond).clamp(self.low, self.high)
