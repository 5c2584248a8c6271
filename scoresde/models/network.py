r"""A network under a parameterization: what it predicts, and the noise label that it is given. Layer 2.

A `ScoreNet` turns a plain network F into a `ScoreModel` by the coefficients of its parameterization,
$D = a\,x + b\,F(c_{in} x, c_{noise})$, as Karras et al. 2022 (equation 7) do for theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import checks
from scoresde.models.base import ScoreModel
from scoresde.models.prepared import PreparedModel, PreparedNet, call_network, network_result
from scoresde.sde import SDE, expand

PARAMETERIZATIONS = ("noise", "score", "denoise", "velocity", "edm", "scaled_score", "v_prediction")
NOISE_LABELS = ("time", "sigma", "log_sigma")


@dataclasses.dataclass(frozen=True)
class NoiseLabel:
    """What a network is told of the time: scale * quantity + shift.

    The quantity is "time" (t itself), "sigma" (sigma / alpha, the noise level of Karras et al. 2022) or "log_sigma" (its
    natural logarithm). NoiseLabel("time", 999) are the step numbers that the score networks of Song et al. 2021 for VP and
    sub-VP were trained on, NoiseLabel("time", N - 1) those of a discrete schedule of N steps, NoiseLabel("log_sigma", 0.25) the
    label of EDM. Raises `ValueError` for another quantity, a scale or shift that is no finite number, or a scale of 0.
    """

    quantity: str = "time"
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        checks.choice(self.quantity, NOISE_LABELS, "noise label")
        for name in ("scale", "shift"):
            object.__setattr__(self, name, checks.number(getattr(self, name), f"{name} of a noise label"))
        if self.scale == 0.0:
            raise ValueError("scale of a noise label must not be 0: the network would not be told the time.")

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """The label at times t, of t's shape and dtype."""
        if self.quantity == "time":
            value = t
        else:
            value = -0.5 * sde.log_snr(t)
            if self.quantity == "sigma":
                value = value.exp()
        value = value if self.scale == 1.0 else value * self.scale
        return value if self.shift == 0.0 else value + self.shift


_FROM_NOISE = ("noise", "score", "scaled_score")  # what these predict is the noise, up to a factor


class ScoreNet(ScoreModel):
    """A network `net(x, label)` or `net(x, label, cond)` under one of seven parameterizations.

    | parameterization | the network predicts | it is given |
    |---|---|---|
    | noise | E[eps given x_t] | x, t |
    | score | the score | x, t |
    | denoise | E[x_0 given x_t] | x, t |
    | velocity | dx/dt of the probability flow, d alpha/dt x_0 + d sigma/dt eps | x, t |
    | edm | the unit-variance target of Karras et al. 2022, table 1 | x / sqrt(sigma^2 + alpha^2 sigma_data^2), ln(sigma/alpha)/4 |
    | scaled_score | sigma times the score, which is -E[eps given x_t] | x, t |
    | v_prediction | alpha eps - sigma x_0 (Salimans & Ho 2022, section 4) | x, t |

    `label` replaces t (or the logarithm) by another noise label, see `NoiseLabel`: with it a network that was trained on
    discrete steps or on sigma is used as it is. With x (B, *) the label has shape (B,). `denoise` of the noise and score
    parameterizations divides by alpha, so it is undefined where alpha = 0 (rectified flow at t = 1). Raises `ValueError` for an
    unknown parameterization, or when the network returns another shape than x's.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        parameterization: str = "noise",
        *,
        label: NoiseLabel | None = None,
        sigma_data: float = 1.0,
        data_mean: Tensor | None = None,
        event_shape: tuple[int, ...] | None = None,
        levels: int | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ):
        super().__init__()
        self.net = net
        self.sde = sde
        self.parameterization = checks.choice(parameterization, PARAMETERIZATIONS, "parameterization")
        if label is not None and not isinstance(label, NoiseLabel):
            raise TypeError(f"label must be a NoiseLabel such as NoiseLabel('time', 999), got {label!r}.")
        self.label = label or (NoiseLabel("log_sigma", 0.25) if parameterization == "edm" else NoiseLabel())
        if self.label.quantity == "log_sigma":  # which still changes where the noise is nearly 0
            self.flow_scales, self.trace_scales = (0.001, 0.003), (0.001, 0.05)
        self.sigma_data, self.event_shape, self.data_mean = sigma_data, event_shape, data_mean
        self.levels, self.value_range = levels, value_range

    @property
    def flow_end(self) -> float:
        divides_by_alpha = self.parameterization in _FROM_NOISE
        return self.sde.t_max if divides_by_alpha and float(self.sde.alpha(1.0)) == 0.0 else 1.0

    def inputs(self, t: Tensor) -> tuple[Tensor | None, Tensor]:
        """What the network is given at times t: the factor of x (None for 1) and the noise label."""
        label = self.label(self.sde, t)
        if self.parameterization != "edm":
            return None, label
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return torch.rsqrt(sigma**2 + (alpha * self.sigma_data) ** 2), label

    def output(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        scale, label = self.inputs(self.time_of(t, x))
        out = call_network(self.net, x if scale is None else expand(scale, x) * x, label, cond)
        return network_result(out, x)

    def prepare(self, x: Tensor, times: Tensor, *, compile: bool = False) -> PreparedModel:
        if self._redefined or type(self).output is not ScoreNet.output:
            if compile:
                return super().prepare(x, times, compile=True)
            return PreparedModel(self, x, times, plain=self._redefined)
        return PreparedNet(self, x, times, compile=compile)

    @property
    def _redefined(self) -> bool:
        """Whether a subclass gives the denoiser itself, so that nothing may be read off the network's output instead."""
        return type(self).denoise is not ScoreNet.denoise

    def affine(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, b, c, e = (torch.zeros_like(t) if v is None else v for v in self._coefficients(t))
        return a, b, c, e

    def _coefficients(self, t: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        """(a, b, c, e) with D = a x + b F and eps = c x + e F for the network's output F; None stands for 0.

        Both rows come from x = alpha D + sigma eps and what F means, solved so that neither loses digits where
        sigma or alpha is small.
        """
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        kind = self.parameterization
        if kind == "noise":
            return 1 / alpha, -sigma / alpha, None, torch.ones_like(t)
        if kind == "score":
            return 1 / alpha, sigma**2 / alpha, None, -sigma
        if kind == "scaled_score":
            return 1 / alpha, sigma / alpha, None, -torch.ones_like(t)
        if kind == "v_prediction":
            total = alpha**2 + sigma**2
            return alpha / total, -sigma / total, sigma / total, alpha / total
        if kind == "denoise":
            return None, torch.ones_like(t), 1 / sigma, -alpha / sigma
        if kind == "velocity":
            alpha_dot, sigma_dot = self.sde.alpha_dot(t), self.sde.sigma_dot(t)
            det = sigma * alpha_dot - alpha * sigma_dot
            return -sigma_dot / det, sigma / det, alpha_dot / det, -alpha / det
        variance = sigma**2 + (alpha * self.sigma_data) ** 2  # edm
        root = self.sigma_data * torch.rsqrt(variance)
        return alpha * self.sigma_data**2 / variance, sigma * root, sigma / variance, -alpha * root

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        t = self.time_of(t, x)
        a, b, _, _ = self._coefficients(t)
        return _combine(a, x, b, self.output(x, t, cond))

    def noise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        if self._redefined:
            return super().noise(x, t, cond)
        t = self.time_of(t, x)
        _, _, c, e = self._coefficients(t)
        return _combine(c, x, e, self.output(x, t, cond))

    def predict(self, x: Tensor, t: Tensor | float, cond: Any = None) -> tuple[Tensor, Tensor]:
        if self._redefined:
            return super().predict(x, t, cond)
        t = self.time_of(t, x)
        a, b, c, e = self._coefficients(t)
        out = self.output(x, t, cond)
        return _combine(a, x, b, out), _combine(c, x, e, out)

    def score(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        if self.parameterization == "score" and not self._redefined:
            return self.output(x, self.time_of(t, x), cond).clone()
        return super().score(x, t, cond)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        if self._redefined:
            return super().velocity(x, t, cond)
        t = self.time_of(t, x)
        if self.parameterization == "velocity":
            return self.output(x, t, cond).clone()
        if self.parameterization in _FROM_NOISE:
            # alpha'/alpha x + (sigma' - sigma alpha'/alpha) eps: the form that never divides by sigma
            rate = self.sde.alpha_dot(t) / self.sde.alpha(t)
            gain = self.sde.sigma_dot(t) - self.sde.sigma(t) * rate
            return expand(rate, x) * x + expand(gain, x) * self.noise(x, t, cond)
        return super().velocity(x, t, cond)


def _combine(a: Tensor | None, x: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return expand(b, x) * out if a is None else expand(a, x) * x + expand(b, x) * out
