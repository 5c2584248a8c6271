"""What a training run is told, and the presets. Layer 4."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scoresde import checks
from scoresde.losses import TIME_SAMPLING, WEIGHTINGS
from scoresde.models.network import PARAMETERIZATIONS
from scoresde.sde import SDES

MAX_THREADS = 1024  # more would end the process where the system has no more to give
_RENAMED = {"law": "time_sampling"}  # in checkpoints of earlier versions


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides the trained parameters.

    `data` as in `load_images` ("digits" takes its own train and validation split; other data are split by
    `validation_fraction`); `levels`, of the data where they do not say. The network: a `LeanUNet` of `channels` and
    `blocks` per resolution under `parameterization` ("levels": `QuantizedScoreNet`; or one of `ScoreNet`'s). `augment`
    is the share of each batch that is replaced by changed images with their labels. `time_sampling` and `weighting` as in
    `scoresde.losses`, `log_snr_range` the range of log-SNR that is trained. The learning rate warms up over `warmup`
    steps, then falls by a cosine to `final_learning_rate` times its peak; `ema` is the decay of the averaged
    parameters, which are the ones that are saved and scored. `minutes` bounds the time spent in training steps: where the
    machine is too slow for `steps`, the schedule follows the clock, and the run is no longer reproducible to the bit.
    `threads` of one training step on a CPU: on small images one is as fast as two (7.8 and 7.9 steps a second with the
    default network on a 2-core machine) and costs half.
    """

    data: str = "digits"
    levels: int | None = None
    validation_fraction: float = 0.1
    sde: str = "CosineSDE"
    sde_options: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"log_snr_min": -10.0, "log_snr_max": 16.0}
    )
    parameterization: str = "levels"
    sigma_data: float = 0.75
    channels: tuple[int, ...] = (32, 64)
    blocks: tuple[int, ...] = (2, 4)
    dropout: float = 0.1
    augment: float = 0.35
    batch_size: int = 64
    steps: int = 3000
    minutes: float | None = None
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.02
    weight_decay: float = 0.01
    warmup: int = 100
    ema: float = 0.999
    gradient_clip: float = 1.0
    weighting: str = "likelihood"
    time_sampling: str = "importance"
    log_snr_range: tuple[float, float] | None = (-9.0, 9.5)
    evaluate_every: int = 250
    checkpoint_every: int = 500
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        checks.choice(self.sde, SDES, "SDE")
        checks.choice(self.weighting, WEIGHTINGS, "weighting")
        checks.choice(self.time_sampling, TIME_SAMPLING, "time sampling")
        checks.choice(self.parameterization, ("levels", *PARAMETERIZATIONS), "parameterization")
        if not isinstance(self.data, str):
            raise TypeError(f"data must be a name or a path as a string, got {self.data!r}.")
        keep = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (frozen, but not yet made)
        keep("seed", _integer(self.seed, "seed", 0, 2**64 - 1))
        keep("threads", _integer(self.threads, "threads", 1, MAX_THREADS))
        keep("warmup", _integer(self.warmup, "warmup", 0))
        for name in ("batch_size", "steps", "evaluate_every", "checkpoint_every"):
            keep(name, checks.positive_int(getattr(self, name), name))
        if self.levels is not None:
            keep("levels", _integer(self.levels, "levels", 2))
        for name in ("learning_rate", "gradient_clip", "sigma_data"):
            keep(name, checks.positive(getattr(self, name), name))
        if self.minutes is not None:
            keep("minutes", checks.positive(self.minutes, "minutes"))
        for name in ("weight_decay", "final_learning_rate"):
            keep(name, _number(getattr(self, name), name, 0.0))
        for name in ("augment", "dropout", "ema", "validation_fraction"):
            keep(name, _number(getattr(self, name), name, 0.0, 1.0))
        channels = _sequence(self.channels, "channels")
        blocks = _sequence(self.blocks, "blocks")
        if not channels or len(channels) != len(blocks):
            raise ValueError(f"channels and blocks must have one entry per resolution, got {channels} and {blocks}.")
        keep("channels", tuple(_integer(c, "channels", 1) for c in channels))
        keep("blocks", tuple(_integer(b, "blocks", 0) for b in blocks))
        if not isinstance(self.sde_options, dict):
            raise TypeError(f"sde_options must be a dict of numbers, got {self.sde_options!r}.")
        try:
            SDES[self.sde](**self.sde_options)
        except TypeError as e:
            raise ValueError(f"sde_options {self.sde_options} do not fit {self.sde}: {e}.") from e
        if self.log_snr_range is not None:
            ends = tuple(_number(v, "log_snr_range", -math.inf) for v in _sequence(self.log_snr_range, "log_snr_range"))
            if len(ends) != 2 or not ends[0] < ends[1]:
                raise ValueError(f"log_snr_range must be (low, high) with low < high, got {self.log_snr_range}.")
            keep("log_snr_range", ends)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainOptions:
        """The inverse of `to_json`; names of earlier versions are known. Raises `ValueError` for unknown ones."""
        values = {_RENAMED.get(k, k): v for k, v in values.items()}
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"unknown training options {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)


def _integer(value: Any, name: str, low: int, high: int | None = None) -> int:
    """`value` as an int in low..high; `TypeError` for another kind of number, `ValueError` outside."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(
            f"{name} must be {f'at least {low}' if high is None else f'from {low} to {high}'}, got {value}."
        )
    return number


def _number(value: Any, name: str, low: float, high: float = math.inf) -> float:
    """`value` as a finite float in [low, high); `TypeError` for what is no number, `ValueError` outside."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    number: Any = value  # the class Real has no <= for the type checker
    if not (math.isfinite(number) and low <= number < high):
        raise ValueError(f"{name} must be a finite number in [{low:g}, {high:g}), got {value}.")
    return float(number)


def _sequence(value: Any, name: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a tuple of numbers, got {value!r}.")
    return tuple(value)


# Chosen on validation bits/dim. Regularisation decides: 1,300 images are few, so longer runs change and drop out more.
TRAIN_PRESETS: dict[str, TrainOptions] = {
    "demo": TrainOptions(steps=2000, minutes=5.0, augment=0.2, evaluate_every=200),
    "digits": TrainOptions(steps=7500, dropout=0.25, augment=0.5, weight_decay=0.05),
    "digits-long": TrainOptions(
        steps=13500, channels=(48, 96), dropout=0.25, augment=0.6, weight_decay=0.05, evaluate_every=500
    ),
}
