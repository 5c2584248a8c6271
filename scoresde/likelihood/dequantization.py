r"""Dequantization: how an integer becomes a point that a density can be asked about.

Layer 3. A continuous model with density p gives level k the probability $P(k) = \int_{I_k} p(v)\,dv$ of its interval (for an
image: of the product of its pixels' intervals). A dequantizer is a density q(v|k) on that interval, and

$$\log P(k) \ge E\left[\log \frac1K \sum_{j=1}^{K} \frac{p(v_j)}{q(v_j|k)}\right], \qquad v_j \sim q(\cdot|k),$$

with a gap that falls with K (Burda et al. 2016, theorem 1) and for K = 1 is the KL divergence of q from p restricted to the
interval. Uniform q: Theis et al. 2016, section 3.1. Truncated normal q: Zheng et al. 2023, "Improved techniques for maximum
likelihood estimation for diffusion ODEs". Learned q: Ho et al. 2019, "Flow++", section 3.1.

Which one fits depends on what the model was trained on. A model of uniformly dequantized images is nearly flat within an
interval: uniform, or learned. A model of the interval's centres (images scaled to [-1, 1] without noise) is at t_min a comb of
normals of standard deviation sigma(t_min): truncated normal, where uniform would be far off, and the other way round.
"""

from __future__ import annotations

import math
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from scoresde import checks, conditions
from scoresde.models.base import ScoreModel
from scoresde.modes import device_of, dtype_of, evaluating
from scoresde.rng import RandomSource, Seed
from scoresde.sde import sum_event

DEQUANTIZATIONS = ("uniform", "truncated-normal")  # those without parameters, which go by a name
MOST_LEVELS = 2**24
ENTRIES_OF_DATA = 16  # examples of fewer entries may well be the points of a plot's mesh
LOG_SCALES = (-8.0, 0.5)  # of the learned flow: from a spike to a density that grows like u^-0.4 towards the ends
SALT = 5  # dequantization noise must not repeat the noise that data or samples were drawn from with the same seed
_TINY = 2.0**-53


def dequantize(k: Tensor, levels: int, value_range: tuple[float, float], u: Tensor) -> Tensor:
    """x = low + (high - low)(k + u) / levels for integers k and u in [0, 1), in u's dtype."""
    check_levels(levels)
    low, high = pair(value_range)
    return low + (high - low) * (k.to(u.dtype) + u) / levels


def quantize(x: Tensor, levels: int, value_range: tuple[float, float]) -> Tensor:
    """The level 0..levels-1 (int64) whose interval holds x; values beyond the range get the outermost level."""
    check_levels(levels)
    low, high = pair(value_range)
    return torch.floor((x - low) / (high - low) * levels).clamp(0, levels - 1).long()


class Dequantizer(ABC):
    """A density q(v|k) on the interval of level k, from which points can be drawn.

    `levels` and `value_range`: level k is the interval from low + (high - low) k / levels, (high - low) / levels wide.
    """

    levels: int
    value_range: tuple[float, float]

    @abstractmethod
    def draw(self, data: Tensor, source: RandomSource | Seed = None) -> tuple[Tensor, Tensor]:
        """(v, log q(v|data)) for integers (B, *): points (B, *) in the model's scale, log densities (B,) nats, float64.

        `source`: random numbers, advanced by the draw, or a seed (one int per example is honoured).
        """

    def _configure(self, levels: int, value_range: tuple[float, float], dtype: torch.dtype) -> None:
        self.levels, self.value_range = check_levels(levels), pair(value_range)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch dtype, which the points are given, got {dtype!r}.")
        self.dtype = dtype

    @property
    def width(self) -> float:
        """Length of one interval in the model's scale."""
        return (self.value_range[1] - self.value_range[0]) / self.levels

    def __repr__(self) -> str:
        return f"{type(self).__name__}(levels={self.levels}, value_range={self.value_range})"


class UniformDequantizer(Dequantizer):
    r"""v = low + width (k + u), u ~ U[0, 1); $\log q = -d \log width$ (Theis et al. 2016, section 3.1).

    Arguments: `levels`; `value_range`, the (low, high) of all levels in the model's scale; `dtype` of the points.
    Raises `ValueError` for fewer than 2 levels or an empty range.
    """

    def __init__(
        self, levels: int, value_range: tuple[float, float] = (-1.0, 1.0), *, dtype: torch.dtype = torch.float32
    ):
        self._configure(levels, value_range, dtype)

    def draw(self, data: Tensor, source: RandomSource | Seed = None) -> tuple[Tensor, Tensor]:
        data, source = prepared(data, source, self.levels)
        v = dequantize(data, self.levels, self.value_range, source.uniform(data.shape, self.dtype))
        log_q = -(math.prod(data.shape[1:]) * math.log(self.width))
        return v, torch.full((data.shape[0],), log_q, dtype=torch.float64, device=data.device)


class TruncatedNormalDequantizer(Dequantizer):
    r"""The model's own noise at t_min about the interval's centre c, truncated to the interval (Zheng et al. 2023):

    $$v = \alpha (c + s z), \qquad z \sim N(0, 1) \text{ given } |z| \le \tau = \frac{width}{2s}, \qquad
      \log q = -\sum_i \left[\tfrac12 z_i^2 + \log\left(\sqrt{2\pi}\,\alpha s\,\mathrm{erf}(\tau/\sqrt2)\right)\right],$$

    with s = sigma/alpha at t_min. For models of the levels' centres; the interval is scaled by alpha(t_min) as the data are.

    Arguments: `levels`, `value_range` and `dtype` as for `UniformDequantizer`; `std`, s in units of the data; `scale`, alpha.
    Raises `ValueError` for a `std` or `scale` that is not positive.
    """

    def __init__(
        self,
        levels: int,
        value_range: tuple[float, float] = (-1.0, 1.0),
        *,
        std: float,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        self._configure(levels, value_range, dtype)
        self.std, self.scale = checks.positive(std, "std"), checks.positive(scale, "scale")

    def draw(self, data: Tensor, source: RandomSource | Seed = None) -> tuple[Tensor, Tensor]:
        data, source = prepared(data, source, self.levels)
        tau = 0.5 * self.width / self.std
        mass = math.erf(tau * 0.5**0.5)
        u = source.uniform(data.shape, torch.float64)
        z = (2**0.5 * torch.special.erfinv((2 * u - 1) * mass)).clamp(-tau, tau)
        centre = self.value_range[0] + self.width * (data.double() + 0.5)
        v = (self.scale * (centre + self.std * z)).to(self.dtype)
        z = (v.double() / self.scale - centre) / self.std  # of the point that the model will see, rounded to its dtype
        constant = math.log((2 * math.pi) ** 0.5 * self.scale * self.std * mass)
        return v, -sum_event(0.5 * z.square() + constant)


class VariationalDequantizer(Dequantizer, nn.Module):
    r"""A learned density on the interval: per entry, a logistic variable through an affine map and a sigmoid,

    $$u_i = \mathrm{sigmoid}(m_i + s_i e_i), \quad e_i \sim \mathrm{Logistic}(0, 1), \qquad
      \log q = \sum_i \left[\log\frac{\rho(e_i)}{\rho(m_i + s_i e_i)} - \log s_i\right] - d\log width,$$

    with rho(e) = sigmoid(e) sigmoid(-e) and m, s (both (B, *)) from a small network that sees all of k: two 3 x 3 convolutions
    for images (B, c, h, w), a perceptron otherwise. It starts at m = 0, s = 1, which is uniform dequantization.

    Arguments: `event_shape` of one example; `levels`, `value_range` and `dtype` as for `UniformDequantizer`; `width_net`,
    channels; `seed` of the first weights. Raises `ValueError` for an empty event, levels below 2 or an empty range.
    Reference: Ho et al. 2019, section 3.1 (there with a deep flow).
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        levels: int,
        value_range: tuple[float, float] = (-1.0, 1.0),
        *,
        width_net: int = 32,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        nn.Module.__init__(self)
        self._configure(levels, value_range, dtype)
        if not isinstance(event_shape, Sequence):
            raise TypeError(f"event_shape must be the shape of one example, such as (1, 28, 28), got {event_shape!r}.")
        self.event_shape = tuple(checks.positive_int(n, "every entry of event_shape") for n in event_shape)
        if not self.event_shape:
            raise ValueError("event_shape must have at least one axis, got ().")
        wide = checks.positive_int(width_net, "width_net")
        image = len(self.event_shape) == 3
        size = self.event_shape[0] if image else math.prod(self.event_shape)
        layer, options = (nn.Conv2d, dict(kernel_size=3, padding=1)) if image else (nn.Linear, {})
        first, second = (nn.utils.skip_init(layer, n, wide, **options) for n in (size, wide))
        last = (
            nn.utils.skip_init(nn.Conv2d, wide, 2 * size, 1) if image else nn.utils.skip_init(nn.Linear, wide, 2 * size)
        )
        self.net = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        generator = torch.Generator().manual_seed(operator.index(seed))
        with torch.no_grad():
            for p in self.net.parameters():
                p.zero_()
            for inner in (first, second):
                fan_in = inner.weight[0].numel()
                inner.weight.normal_(0.0, (2 / fan_in) ** 0.5, generator=generator)

    def draw(self, data: Tensor, source: RandomSource | Seed = None) -> tuple[Tensor, Tensor]:
        data, source = prepared(data, source, self.levels)
        with evaluating(self):
            return self._draw(data, source)

    def _draw(self, data: Tensor, source: RandomSource) -> tuple[Tensor, Tensor]:
        """`draw` with gradients to the parameters."""
        checks.same_shape(data, (data.shape[0], *self.event_shape), "the data given to the dequantizer")
        home = next(self.parameters())
        if data.device.type != home.device.type:
            raise ValueError(
                f"data are on {data.device}, the dequantizer on {home.device}; move it with .to({str(data.device)!r})."
            )
        x = (2 * (data.to(home.dtype) + 0.5) / self.levels - 1) * 3**0.5
        x = self.net(x if len(self.event_shape) == 3 else x.flatten(1))
        shift, log_scale = (v.reshape(data.shape).double() for v in x.chunk(2, 1))
        log_scale = log_scale.clamp(*LOG_SCALES)
        e = torch.logit(source.uniform(data.shape, torch.float64).clamp(_TINY, 1 - _TINY))
        y = shift + log_scale.exp() * e
        log_q = sum_event(_log_rho(e) - _log_rho(y) - log_scale - math.log(self.width))
        return dequantize(data, self.levels, self.value_range, torch.sigmoid(y)).to(self.dtype), log_q

    def fit(
        self,
        target: ScoreModel | Callable[..., Tensor],
        data: Tensor,
        *,
        steps: int = 300,
        batch_size: int = 128,
        learning_rate: float = 1e-2,
        t: float | None = None,
        seed: Seed = 0,
        cond: Any = None,
    ) -> VariationalDequantizer:
        r"""Maximise $E_q[\log p(v) - \log q(v|k)]$ over the parameters by Adam with a cosine decay; returns itself.

        `target`: a `ScoreModel`, or a differentiable log density or bound, (B, *) -> (B,) nats, called as target(v) or, with a
        condition, target(v, cond). Of a `ScoreModel` only the score is asked, once per step and without a backward pass
        through it: the gradient of log p at v is the score at `t` (t_min by default; a later t smooths the target).
        `data`: integers (N, *) on the dequantizer's device; `seed` decides batches and noise.

        Raises as `checks.integers` for the data, `TypeError` for another target, `ValueError` for a target that gives no
        gradient, `NonFiniteError` (naming the step) where one is NaN or infinite.
        """
        data = checks.integers(data, self.levels)
        if data.shape[0] == 0:
            raise ValueError("data is empty; a dequantizer is fitted on at least one example.")
        checks.same_shape(data, (data.shape[0], *self.event_shape), "the data given to fit")
        conditions.check(cond, data.shape[0])
        if not callable(target):
            raise TypeError(f"target must be a ScoreModel or a function of (B, *), got {type(target).__name__}.")
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            checks.positive_int(value, name)
        device, n = device_of(self), min(batch_size, data.shape[0])
        data, cond = data.to(device), conditions.move(cond, device)
        source = RandomSource(seed, device, n, salt=SALT)
        parameters = list(self.parameters())
        adam = torch.optim.Adam(parameters, lr=checks.positive(learning_rate, "learning_rate"))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for step in range(steps):
            rows = (source.uniform((n, 1), torch.float64).squeeze(1) * data.shape[0]).long()
            with torch.enable_grad():
                v, log_q = self._draw(data[rows], source)
                loss = -(_objective(target, v, t, conditions.take_rows(cond, rows)) - log_q).mean()
                gradients = torch.autograd.grad(loss, parameters)
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                raise checks.NonFiniteError(f"the gradient of the target is NaN or infinite at step {step} of fit.")
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            adam.step()
            decay.step()
        adam.zero_grad(set_to_none=True)
        return self


def _objective(target: Any, v: Tensor, t: float | None, cond: Any) -> Tensor:
    """log p(v) (B,) up to what v does not enter: for a model, a function with the score as its gradient."""
    if isinstance(target, ScoreModel):
        t = target.sde.t_min if t is None else t
        with evaluating(target):
            score = target.score(v.detach().to(dtype_of(target)), t, cond)
        return sum_event(score.double() * v.double())
    value = target(v) if cond is None else target(v, cond)
    checks.same_shape(value, (v.shape[0],), "what the target returned")
    if not value.requires_grad:
        raise ValueError(
            "the target gives no gradient with respect to the points; pass a differentiable log density or bound, or the "
            "ScoreModel itself (log_prob and elbo compute without gradients)."
        )
    return value.double()


def _log_rho(e: Tensor) -> Tensor:
    return logsigmoid(e) + logsigmoid(-e)


def prepared(data: Tensor, source: RandomSource | Seed, levels: int) -> tuple[Tensor, RandomSource]:
    """What every `draw` begins with: checked integers, and a `RandomSource` where a seed was given."""
    data = checks.integers(data, levels)
    if not isinstance(source, RandomSource):
        source = RandomSource(source, data.device, data.shape[0], salt=SALT)
    return data, source


def pair(value_range: Any) -> tuple[float, float]:
    """(low, high) as floats; `ValueError` unless both are finite and low < high."""
    try:
        low, high = (float(v) for v in value_range)
    except (TypeError, ValueError) as e:
        raise ValueError(f"value_range must be a pair (low, high), got {value_range!r}.") from e
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(f"value_range must be (low, high), finite and low < high, got ({low}, {high}).")
    return low, high


def dequantizer(
    choice: str | Dequantizer, model: ScoreModel, levels: int, value_range: tuple[float, float]
) -> Dequantizer:
    """The dequantizer that `choice` names for this model, or `choice` itself (any object with `draw`) after checks.

    Raises `ValueError` for an unknown name, for "truncated-normal" where sigma(t_min) = 0, and for an object made for other
    levels or another range; `TypeError` for an object without `draw`.
    """
    if isinstance(choice, str):
        if choice == "variational":
            raise ValueError(
                "a variational dequantizer has parameters and is not known by name; make one with VariationalDequantizer("
                "event_shape, levels, value_range).fit(model, data) and pass it as dequantization=."
            )
        checks.choice(choice, DEQUANTIZATIONS, "dequantization")
        if choice == "uniform":
            return UniformDequantizer(levels, value_range, dtype=dtype_of(model))
        sde = model.sde
        alpha, sigma = float(sde.alpha(sde.t_min)), float(sde.sigma(sde.t_min))
        if not sigma > 0:
            raise ValueError(
                f"'truncated-normal' takes its width from sigma(t_min), which is 0 at t_min = {sde.t_min:g}; give the SDE a "
                "t_min > 0, or pass TruncatedNormalDequantizer(levels, value_range, std=...)."
            )
        return TruncatedNormalDequantizer(levels, value_range, std=sigma / alpha, scale=alpha, dtype=dtype_of(model))
    if isinstance(choice, type) or not callable(getattr(choice, "draw", None)):
        raise TypeError(
            f"dequantization must be one of {', '.join(DEQUANTIZATIONS)}, or an object with draw(data, source), got {choice!r}."
        )
    asked: dict[str, Any] = {"levels": levels, "value_range": value_range}
    for name, expected in asked.items():
        got = getattr(choice, name, expected)
        if (got != expected) if name == "levels" else (tuple(got) != tuple(expected)):
            raise ValueError(f"the dequantizer was made for {name}={got}, the data are in {name}={expected}.")
    return choice


def check_levels(levels: int) -> int:
    """`levels`; `TypeError` unless an integer, `ValueError` below 2 or above `MOST_LEVELS`."""
    if not 2 <= checks.positive_int(levels, "levels") <= MOST_LEVELS:
        raise ValueError(
            f"levels must be at least 2 and at most 2^24, whose intervals float32 still tells apart, got {levels}."
        )
    return int(levels)


def levels_of(model: ScoreModel, levels: int | None) -> int:
    """The levels of the data: those given, the model's, or 256. `ValueError` where both are given and differ."""
    if levels is None:
        return 256 if model.levels is None else model.levels
    check_levels(levels)
    if model.levels is not None and levels != model.levels:
        raise ValueError(
            f"the model was made for data of {model.levels} levels, got levels={levels}; pass its own data."
        )
    return levels


def check_reach(k: Tensor, model: ScoreModel, levels: int | None) -> None:
    """`ValueError` where neither `levels` nor the model says how many there are and integers k reach a quarter of 256 at most."""
    if levels is None and model.levels is None and k.numel() and int(k.max()) < 64:
        raise ValueError(
            f"levels is not given and the model does not say; 256 is the default, but the data only reach {int(k.max())}. "
            "Pass levels= (256 if these are dark 8-bit images)."
        )


def log_mean_weight(log_weights: Tensor) -> Tensor:
    """log((1/K) sum_j exp(log_weights_j)) over the first axis, (K, *) -> (*), with no rounding for K = 1."""
    if log_weights.shape[0] == 1:
        return log_weights[0]
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])


def looks_quantized(x: Any, *, max_levels: int = 1024) -> int | None:
    """How many levels float data x (B, *) seem to lie on: grid points from least to largest; None if there is no grid.

    Looks at up to 65536 values from the front. There is a grid where values repeat (at least twice each, on average) and all
    differ by multiples of one step, at most `max_levels` of them; images (B, c, *) scaled per channel are looked at channel by
    channel. A density fitted to such data has no upper bound, and its bits/dim mean nothing without dequantization.
    """
    checks.batch(x)
    checks.positive_int(max_levels, "max_levels")
    x = x.detach()
    if x.dim() > 2 and 1 < x.shape[1] <= 16:
        whole = _grid_points(x.flatten()[:65536], max_levels)
        if whole is not None:
            return whole
        found = [_grid_points(x[:, c].flatten()[:65536], max_levels) for c in range(x.shape[1])]
        return None if None in found else max(cast("list[int]", found))
    return _grid_points(x.flatten()[:65536], max_levels)


def _grid_points(values: Tensor, max_levels: int) -> int | None:
    if not bool(torch.isfinite(values).all()):
        return None
    points = torch.unique(values)
    if not 2 <= points.numel() <= min(max_levels, values.numel() // 2):
        return None
    rounding = 4 * torch.finfo(points.dtype).eps * float(points.abs().max())
    points = points.double()
    gaps, reach = torch.diff(points), float(points[-1] - points[0])
    gaps = gaps[gaps > 4 * rounding]  # one level may have been computed in two ways
    count = round(reach / float(gaps.min())) if gaps.numel() else 0
    if not 1 <= count < max_levels:
        return None
    place = (points - points[0]) / (reach / count)
    off = float((place - place.round()).abs().max())
    return count + 1 if off < 1e-3 + rounding * count / reach and off < 0.2 else None


def warn_if_quantized(x: Tensor, what: str, stacklevel: int = 3) -> None:
    """Warn that x (B, *), about to be given a density, looks like integers that were scaled but not dequantized.

    Examples of fewer than 16 entries are let pass: they may be the regular points of a plot.
    """
    if math.prod(x.shape[1:]) < ENTRIES_OF_DATA:
        return
    levels = looks_quantized(x)
    if levels is not None:
        warnings.warn(
            f"the data given to {what} lie on a grid of {levels} levels: a density has no finite best value for them. For "
            "integer data use bits_per_dim on the raw integers, or add noise with dequantize.",
            stacklevel=stacklevel,
        )
