"""What a training run is told, and the presets. Layer 4."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from scoresde import checks
from scoresde.losses import TIME_SAMPLING, WEIGHTINGS
from scoresde.sde import SDES


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides the trained parameters.

    `data` as in `load_images` ("digits" takes its own train and validation split; other data are split by
    `validation_fraction`); `levels`, of the data where they do not say. The network: a `UNet` of `channels` and
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
        checks.choice(
            self.parameterization, ("levels", "noise", "score", "denoise", "velocity", "edm"), "parameterization"
        )
        for name in ("batch_size", "steps", "evaluate_every", "checkpoint_every", "threads"):
            checks.positive_int(getattr(self, name), name)
        for name in ("learning_rate", "gradient_clip", "sigma_data"):
            checks.positive(getattr(self, name), name)
        for name in ("warmup", "weight_decay", "final_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.minutes is not None:
            checks.positive(self.minutes, "minutes")
        for name, high in (("augment", 1.0), ("dropout", 1.0), ("ema", 1.0), ("validation_fraction", 1.0)):
            if not 0.0 <= getattr(self, name) < high:
                raise ValueError(f"{name} must lie in [0, {high:g}), got {getattr(self, name)}.")

    def to_json(self) -> dict:
        """As plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict) -> TrainOptions:
        """The inverse of `to_json`. Raises `ValueError` for unknown names."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"unknown training options {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# Chosen on validation bits/dim. Regularisation decides: 1,300 images are few, so longer runs change and drop out more.
TRAIN_PRESETS: dict[str, TrainOptions] = {
    "demo": TrainOptions(steps=2000, minutes=5.0, augment=0.2, evaluate_every=200),
    "digits": TrainOptions(steps=7500, dropout=0.25, augment=0.5, weight_decay=0.05),
    "digits-long": TrainOptions(
        steps=13500, channels=(48, 96), dropout=0.25, augment=0.6, weight_decay=0.05, evaluate_every=500
    ),
}
