r"""The contract between a network and everything else: the denoiser $D(x, t) = E[x_0 \mid x_t = x]$.

Layer 2. With $x_t = \alpha x_0 + \sigma\epsilon$ the other predictions are read off the denoiser, dividing by sigma only:

$$\hat\epsilon = (x - \alpha D)/\sigma, \qquad s = -\hat\epsilon/\sigma, \qquad v = \dot\alpha D + \dot\sigma\hat\epsilon .$$

`s` is the score $\nabla_x \log p_t(x)$ (Tweedie's formula) and `v` the velocity dx/dt of the probability-flow ODE
(Song et al. 2021, equation 13; for rectified flow it is the velocity that is usually regressed).
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import checks, conditions
from scoresde.models.prepared import PreparedModel, denoiser_affine
from scoresde.modes import device_of
from scoresde.sde import SDE, check_monotone, expand


class ScoreModel(nn.Module, ABC):
    """A denoiser over a forward process.

    Attributes: `sde`; `sigma_data`, the rough standard deviation of the data (a scale for solvers, 1 by default); `data_mean`,
    the data's mean, of shape event_shape (a hint to solvers), where known; `event_shape`, the shape of one example, where
    known; `levels` and `value_range`, how integer data were scaled, where known: level k stands at
    value_range[0] + (k + u)(value_range[1] - value_range[0]) / levels, 0 <= u < 1. Setting one of these to what it cannot be
    raises `TypeError` or `ValueError`.
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

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        if check is not None and not (value is None and name in _OPTIONAL):
            value = check(value, name)
        if name == "data_mean" and value is not None and self.event_shape is not None:
            checks.same_shape(value, self.event_shape, name)
        super().__setattr__(name, value)

    @property
    def data_mean(self) -> Tensor | None:
        """The data's mean (*event), None where it is not known. It moves with the model, but is no part of its `state_dict`."""
        return self._buffers.get("data_mean")

    @data_mean.setter
    def data_mean(self, value: Tensor | None) -> None:
        self._buffers["data_mean"] = value
        self._non_persistent_buffers_set.add("data_mean")

    @abstractmethod
    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """E[x_0 | x_t = x] for x (B, *) and t () or (B,); same shape and dtype as x."""

    def noise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """E[eps | x_t = x], (x - alpha D) / sigma."""
        return self.predict(x, t, cond)[1]

    def predict(self, x: Tensor, t: Tensor | float, cond: Any = None) -> tuple[Tensor, Tensor]:
        """The pair (denoise, noise) from one evaluation."""
        t = self.time_of(t, x)
        denoised = self.denoise(x.clone(), t, cond)  # which may write into what it is given
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

    def prepare(self, x: Tensor, times: Tensor, *, compile: bool = False) -> PreparedModel:
        """This model prepared for a solve of states like x (B, *) through float64 `times` (N,).

        `compile` asks for a compiled network; only a plain `ScoreNet` has one to compile (`ValueError` for others).
        """
        if compile:
            raise ValueError(
                f"compile=True is for a plain ScoreNet; compile the parts of a {type(self).__name__} yourself."
            )
        return PreparedModel(self, x, times)

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

    # -- files and the hub ----------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """`scoresde.save_pretrained(self, folder)`."""
        return _files().save_pretrained(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload a score model",
    ) -> str:
        """`scoresde.push_to_hub(self, repo_id, ...)`."""
        return _files().push_to_hub(self, repo_id, private=private, token=token, commit_message=commit_message)

    @staticmethod
    def from_pretrained(path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None) -> ScoreModel:
        """`scoresde.from_pretrained(path_or_hub_id, ...)`."""
        return _files().from_pretrained(path_or_hub_id, revision=revision)


def _files() -> Any:
    """The room of model files, which stands far above and is looked for where people look for it: at the model."""
    return importlib.import_module("scoresde.interop")


def _mean(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor of one example's shape or None, got {kind}.")
    if not value.is_meta:  # the sketch of a model has no numbers
        checks.finite(value, name)
    return value.detach()


# what a model says of its data is checked wherever it is set
_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "sigma_data": checks.positive,
    "data_mean": _mean,
    "event_shape": checks.event_shape,
    "levels": checks.level_count,
    "value_range": checks.value_range,
}
_OPTIONAL = ("data_mean", "event_shape", "levels")


def require_model(model: Any) -> ScoreModel:
    """`model` if it is a `ScoreModel`; otherwise a `TypeError` that says how to make one."""
    if not isinstance(model, ScoreModel):
        raise TypeError(
            f"model must be a ScoreModel, got {type(model).__name__}; wrap a network as ScoreNet(net, sde, 'noise'), or "
            "diffuse a mixture with mixture.diffuse(sde)."
        )
    return model


def check_input(model: Any, x: Any, cond: Any = None, name: str = "x") -> None:
    """What every computation on data asks of (model, x, cond): types, shapes, finite values, a sound process, one device."""
    require_model(model)
    checks.batch(x, name)
    model.check_event(tuple(x.shape[1:]))
    checks.finite(x, name)
    check_monotone(model.sde, torch.tensor([model.sde.t_min, model.sde.t_max], dtype=torch.float64))
    conditions.check(cond, x.shape[0])
    home = device_of(model)
    if x.device.type != home.type:
        raise ValueError(f"{name} is on {x.device}, the model on {home}; move one with .to({str(home)!r}).")
