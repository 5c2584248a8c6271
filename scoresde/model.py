r"""The contract between a network and everything else: the denoiser $D(x, t) = E[x_0 \mid x_t = x]$.

Layer 2. With $x_t = \alpha x_0 + \sigma\epsilon$ the other predictions are read off the denoiser, dividing by sigma only:

$$\hat\epsilon = (x - \alpha D)/\sigma, \qquad s = -\hat\epsilon/\sigma, \qquad v = \dot\alpha D + \dot\sigma\hat\epsilon .$$

`s` is the score $\nabla_x \log p_t(x)$ (Tweedie's formula) and `v` the velocity dx/dt of the probability-flow ODE
(Song et al. 2021, equation 13; for rectified flow it is the velocity that is usually regressed).

A `ScoreNet` turns a plain network F into such a model by coefficients of its parameterization,
$D = a\,x + b\,F(c_{in} x, c_{noise})$, as Karras et al. 2022 (equation 7) do for theirs.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import checks
from scoresde.bound import Bound, BoundNet, call_network, denoiser_affine, network_result
from scoresde.modes import device_of
from scoresde.sde import SDE, expand

PARAMETERIZATIONS = ("noise", "score", "denoise", "velocity", "edm", "scaled_score", "v_prediction")
LABELS = ("time", "sigma", "log_sigma")


@dataclasses.dataclass(frozen=True)
class NoiseLabel:
    """What a network is told of the time: scale * quantity + shift.

    The quantity is "time" (t itself), "sigma" (sigma / alpha, the noise level of Karras et al. 2022) or "log_sigma" (its
    natural logarithm). NoiseLabel("time", 999) are the step numbers that the score networks of Song et al. 2021 for VP and
    sub-VP were trained on, NoiseLabel("time", N - 1) those of a discrete schedule of N steps, NoiseLabel("log_sigma", 0.25) the
    label of EDM. Raises `ValueError` for another quantity.
    """

    quantity: str = "time"
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        checks.choice(self.quantity, LABELS, "noise label")

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


class ScoreModel(nn.Module, ABC):
    """A denoiser over a forward process.

    Attributes: `sde`; `sigma_data`, the rough standard deviation of the data (a scale for solvers, 1 by default);
    `event_shape`, the shape of one example, where known; `levels` and `value_range`, how integer data were scaled,
    where known: level k stands at value_range[0] + (k + u)(value_range[1] - value_range[0]) / levels, 0 <= u < 1.
    """

    # Score and velocity are infinite or undefined where sigma = 0 (t = 0 for VP, sub-VP and rectified flow): use t_min.
    sde: SDE
    sigma_data: float = 1.0
    event_shape: tuple[int, ...] | None = None
    levels: int | None = None
    value_range: tuple[float, float] = (-1.0, 1.0)
    # hints to solvers of the probability flow: the angles (radians, see `scoresde.flow`) from either end, data and noise, down to
    # which its velocity still changes, and the divergence of that; and how far, relatively, the score is from the gradient of
    # the flow's own log density. A network of the noise divides by alpha, which shows until the very end.
    flow_scales: tuple[float, float] = (0.01, 0.003)
    trace_scales: tuple[float, float] = (0.01, 0.05)
    flow_mismatch: float = 0.1

    @abstractmethod
    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """E[x_0 | x_t = x] for x (B, *) and t () or (B,); same shape and dtype as x."""

    def noise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """E[eps | x_t = x], (x - alpha D) / sigma."""
        return self.predict(x, t, cond)[1]

    def predict(self, x: Tensor, t: Tensor | float, cond: Any = None) -> tuple[Tensor, Tensor]:
        """The pair (denoise, noise) from one evaluation."""
        t = self.time_of(t, x)
        denoised = self.denoise(x, t, cond)
        return denoised, (x - expand(self.sde.alpha(t), x) * denoised) / expand(self.sde.sigma(t), x)

    def score(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """grad log p_t(x) = -noise / sigma."""
        t = self.time_of(t, x)
        return -self.noise(x, t, cond) / expand(self.sde.sigma(t), x)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """dx/dt of the probability-flow ODE, f x - g^2 score / 2."""
        t = self.time_of(t, x)
        denoised, noise = self.predict(x, t, cond)  # both, since either alone cancels at one end
        return expand(self.sde.alpha_dot(t), x) * denoised + expand(self.sde.sigma_dot(t), x) * noise

    # -- for solvers: one affine function of one raw output -------------------------------------------------------

    def output(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """The raw output F that `affine` turns into D and eps_hat: here the denoiser itself."""
        return self.denoise(x, t, cond)

    def affine(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, c, e) for float64 times t, any shape, with D = a x + b F and eps_hat = c x + e F."""
        return denoiser_affine(self.sde, t)

    def bound(self, x: Tensor, times: Tensor, *, compile: bool = False) -> Bound:
        """This model prepared for a solve of states like x (B, *) through float64 `times` (N,).

        `compile` asks for a compiled network; only a plain `ScoreNet` has one to compile (`ValueError` for others).
        """
        if compile:
            raise ValueError(
                f"compile=True is for a plain ScoreNet; compile the parts of a {type(self).__name__} yourself."
            )
        return Bound(self, x, times)

    @property
    def flow_end(self) -> float:
        """The t at which the probability flow meets the prior: 1, unless the model is undefined there."""
        return 1.0

    def terminal_log_prob(self, x: Tensor) -> Tensor:
        """Log density at t = 1 that likelihoods end with: the SDE's prior, unless a model knows its own marginal there.

        x (B, *) -> (B,) nats, float64.
        """
        return self.sde.prior_log_prob(x)

    def time_of(self, t: Tensor | float, x: Tensor) -> Tensor:
        """t as a float64 tensor on x's device, after checking x and t. Schedule coefficients are always float64."""
        checks.batch(x)
        checks.time_like(t, x.shape[0])
        if isinstance(t, Tensor):
            return t.to(device=x.device, dtype=torch.float64)
        return torch.full((), t, dtype=torch.float64, device=x.device)  # a fill: a copy would stall a GPU

    def check_event(self, shape: tuple[int, ...]) -> None:
        """`ValueError` unless `shape` (of one example) is what the model was made for, where it says so."""
        if self.event_shape is not None and tuple(shape) != tuple(self.event_shape):
            raise ValueError(
                f"the model was made for examples of shape {tuple(self.event_shape)}, got {tuple(shape)}; "
                "the first axis of x (and of shape=) is the batch."
            )


def require_model(model: Any) -> ScoreModel:
    """`model` if it is a `ScoreModel`; otherwise a `TypeError` that says how to make one."""
    if not isinstance(model, ScoreModel):
        raise TypeError(
            f"model must be a ScoreModel, got {type(model).__name__}; wrap a network as ScoreNet(net, sde, 'noise'), or "
            "diffuse a mixture with mixture.diffuse(sde)."
        )
    return model


def check_cond(cond: Any, batch_size: int) -> None:
    """`ValueError` unless every tensor in a condition has one row per example; `TypeError` for arrays."""
    if isinstance(cond, Tensor):
        if cond.dim() == 0 or cond.shape[0] != batch_size:
            raise ValueError(f"cond must have one row per example, {batch_size}, got shape {tuple(cond.shape)}.")
    elif isinstance(cond, dict):
        for value in cond.values():
            check_cond(value, batch_size)
    elif isinstance(cond, (tuple, list)):
        for value in cond:
            check_cond(value, batch_size)
    elif cond is not None:
        raise TypeError(
            f"cond must be a tensor, or a dict or tuple of tensors, with one row per example, got {type(cond).__name__}; "
            "convert it with torch.as_tensor."
        )


def check_input(model: Any, x: Any, cond: Any = None, name: str = "x") -> None:
    """What every computation on data asks of (model, x, cond): types, shapes, finite values, one device."""
    require_model(model)
    checks.batch(x, name)
    model.check_event(tuple(x.shape[1:]))
    checks.finite(x, name)
    check_cond(cond, x.shape[0])
    home = device_of(model)
    if x.device.type != home.type:
        raise ValueError(f"{name} is on {x.device}, the model on {home}; move one with .to({str(home)!r}).")


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
        self.sigma_data = checks.positive(sigma_data, "sigma_data")
        self.event_shape = None if event_shape is None else tuple(event_shape)
        self.levels = levels
        self.value_range = (float(value_range[0]), float(value_range[1]))

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

    def bound(self, x: Tensor, times: Tensor, *, compile: bool = False) -> Bound:
        if self._redefined or type(self).output is not ScoreNet.output:
            if compile:
                return super().bound(x, times, compile=True)
            return Bound(self, x, times, plain=self._redefined)
        return BoundNet(self, x, times, compile=compile)

    @property
    def _redefined(self) -> bool:
        """Whether a subclass gives the denoiser itself, so that nothing may be read off the network's output instead."""
        return type(self).denoise is not ScoreNet.denoise

    def affine(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(torch.zeros_like(t) if v is None else v for v in self._coefficients(t))

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
            return self.output(x, self.time_of(t, x), cond)
        return super().score(x, t, cond)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        if self._redefined:
            return super().velocity(x, t, cond)
        t = self.time_of(t, x)
        if self.parameterization == "velocity":
            return self.output(x, t, cond)
        if self.parameterization in _FROM_NOISE:
            # alpha'/alpha x + (sigma' - sigma alpha'/alpha) eps: the form that never divides by sigma
            rate = self.sde.alpha_dot(t) / self.sde.alpha(t)
            gain = self.sde.sigma_dot(t) - self.sde.sigma(t) * rate
            return expand(rate, x) * x + expand(gain, x) * self.noise(x, t, cond)
        return super().velocity(x, t, cond)


def _combine(a: Tensor | None, x: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return expand(b, x) * out if a is None else expand(a, x) * x + expand(b, x) * out
