"""What a training run starts from: its data in two parts, an untrained model, an optimizer. Layer 4."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from scoresde.data import AUGMENTATION_DIM, Images, digits, load_images
from scoresde.models.base import ScoreModel
from scoresde.models.network import ScoreNet
from scoresde.models.quantized import QuantizedScoreNet
from scoresde.nets import LeanUNet
from scoresde.rng import derive
from scoresde.sde import SDES
from scoresde.store import digest
from scoresde.train.options import TrainOptions

MAX_POSITIONS = 1024  # attention holds a bias for every pair of positions


def load_splits(options: TrainOptions) -> tuple[Images, Images]:
    """(train, validation): the digits' own split, or a seeded one of any other data."""
    if options.data == "digits":
        images = digits("train"), digits("validation")
        if options.levels not in (None, images[0].levels):
            raise ValueError(f"the digits have {images[0].levels} levels, got levels={options.levels}.")
        return images
    if options.data.startswith("digits:"):
        raise ValueError(f"train on data=digits, which takes its own training split, not on {options.data!r}.")
    whole = load_images(options.data, options.levels)
    n = max(1, round(options.validation_fraction * len(whole)))
    if n >= len(whole):
        raise ValueError(f"{options.data} has {len(whole)} images: too few to hold {n} out for validation.")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(derive(options.seed, 0x59117)))
    parts = (order[n:], "train"), (order[:n], "validation")
    train, validation = (Images(whole.values[rows], whole.levels, f"{whole.name}:{name}") for rows, name in parts)
    return train, validation


def digest_of(splits: tuple[Images, Images]) -> str:
    """SHA-256 of the images of both parts, in their order, and of their levels."""
    small = torch.uint8 if splits[0].levels <= 256 else torch.int64
    values = {name: images.values.to(small) for name, images in zip(("train", "validation"), splits, strict=True)}
    return digest(values, splits[0].levels)


def build_model(options: TrainOptions, images: Images) -> ScoreModel:
    """An untrained model for these images; its initial parameters depend on `options.seed` alone."""
    channels, *size = images.event_shape
    common: dict[str, Any] = dict(
        sigma_data=options.sigma_data, data_mean=mean_of(images), event_shape=images.event_shape
    )
    quantized = options.parameterization == "levels"
    coarse = 2 ** (len(options.channels) - 1)  # pixels to one of the lowest resolution
    with seeded(derive(options.seed, 0x1217)):
        net = LeanUNet(
            QuantizedScoreNet.input_channels(channels) if quantized else channels,
            channels * images.levels if quantized else channels,
            size,
            channels=options.channels,
            blocks=options.blocks,
            attention=math.prod(math.ceil(n / coarse) for n in size) <= MAX_POSITIONS,
            pad=any(n % coarse for n in size),
            cond_dim=AUGMENTATION_DIM if options.augment else 0,
            dropout=options.dropout,
        )
    sde = SDES[options.sde](**options.sde_options)
    if quantized:
        ends: dict[str, Any] = {} if options.log_snr_range is None else {"label_range": options.log_snr_range}
        return QuantizedScoreNet(net, sde, images.levels, **ends, **common)
    return ScoreNet(net, sde, options.parameterization, levels=images.levels, **common)


def mean_of(images: Images) -> torch.Tensor:
    """The mean of the dequantized images on the models' scale, levels 0..L-1 being L equal parts of [-1, 1]; (*event), float32."""
    return ((images.values.double().mean(0) + 0.5) * (2 / images.levels) - 1).float()


def build_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW; biases, norms and other vectors are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.99), fused=True)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """The global generators at `seed` inside, as they were outside."""
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [g.get_state() for g in generators]
    try:
        for g in generators:
            g.manual_seed(seed)
        yield
    finally:
        for g, state in zip(generators, before, strict=True):
            g.set_state(state)
