"""Options for the data at hand, where nobody chose any. Layer 4."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from scoresde.data import Images
from scoresde.train.options import TRAIN_PRESETS, TrainOptions

FEW_LEVELS = 64  # up to here a logit per level and pixel costs little and knows more
FEW_IMAGES = 5000  # up to here changed copies help, and take seconds to make


def options_for(images: Images, **given: Any) -> tuple[TrainOptions, str]:
    """Training options for `images` under which a CPU makes a step in less than a second, and a line that says why these.

    `given` options of `TrainOptions` (their `data` among them) are taken as they are. Up to 64 levels: the digits' recipe, a
    `QuantizedScoreNet`. More: an ordinary network in the "edm" parameterization, whose cost does not grow with the levels, with
    sigma_data the root mean square of the scaled pixels. The network has up to three resolutions, with 4 pixels a side at least.
    """
    channels, *size = images.event_shape
    n = min(2, int(math.log2(max(min(size), 4) / 4)))
    few = len(images) <= FEW_IMAGES and len(size) == 2
    if images.levels <= FEW_LEVELS:
        chosen: dict[str, Any] = dict(
            channels=(32, 64, 128)[: n + 1] if max(size) > 16 else (32, 64)[: n + 1],
            blocks=(1, 1, 2)[-n - 1 :] if max(size) > 16 else (2, 4)[-n - 1 :],
            augment=0.35 if few else 0.0,
        )
        start = TRAIN_PRESETS["digits"]
        why = f"{images.levels} levels, so a network that returns their logits"
    else:
        unit = 2 / (images.levels - 1)
        values = images.values.double() * unit - 1
        chosen = dict(
            parameterization="edm",
            sigma_data=round(max(float(values.square().mean().sqrt()), 0.05), 2),
            log_snr_range=(-9.0, 13.0),
            channels=(32, 64, 128)[: n + 1],
            blocks=(1, 1, 2)[-n - 1 :],
            learning_rate=1e-3,
            augment=0.2 if few else 0.0,
            steps=5000,
            evaluate_every=500,
        )
        start = TrainOptions()
        why = f"{images.levels} levels, of which logits for every pixel would take {images.levels * channels} channels"
    options = dataclasses.replace(start, **{**chosen, **given})
    sides = "x".join(map(str, size))
    text = (
        f"{len(images)} images of {channels} x {sides} in {why}: parameterization {options.parameterization}, channels "
        f"{_numbers(options.channels)} and blocks {_numbers(options.blocks)}, one for each of {len(options.channels)} "
        f"resolution{'s' * (len(options.channels) > 1)}; options that are given, or a --preset, replace these."
    )
    return options, text


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
