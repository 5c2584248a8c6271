"""A residual perceptron for vectors. Layer 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import check_input, zero_
from scoresde.nets.conditioning import ConditionalEmbedding, Conditions
from scoresde.nets.options import arguments


class MLP(nn.Module):
    """Residual perceptron: `forward(x, label, cond=None)`, x (B, dim), label (B,) -> (B, dim).

    Each of the `depth` blocks is norm, modulation by the noise embedding, two layers of `width`; the output layer
    starts at zero. `features` is the kind of noise features, "sinusoidal", "positional" or "fourier", see `NoiseEmbedding`;
    `cond_dim` (the number of features), `classes`, `numbers`, `tokens`, `pooled` and `drop_cond` are the conditions, see
    `Conditions`. `config` holds the arguments.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 128,
        depth: int = 3,
        embedding: int = 64,
        features: str = "sinusoidal",
        fourier_scale: float = 1.0,
        cond_dim: int = 0,
        classes: int = 0,
        numbers: int = 0,
        tokens: int = 0,
        pooled: int = 0,
        drop_cond: float | Mapping[str, float] = 0.0,
        dropout: float = 0.0,
    ):
        given = arguments(locals())
        super().__init__()
        self.config = given
        self.conditions = Conditions.of(given)
        self.embed = ConditionalEmbedding(embedding, self.conditions, kind=features, scale=fourier_scale)
        self.enter = nn.Linear(dim, width)
        self.norm = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(depth))
        self.modulate = nn.ModuleList(nn.Linear(embedding, 2 * width) for _ in range(depth))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(zero_(nn.Linear(width, width)) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.leave = zero_(nn.Linear(width, dim))

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        check_input(x, label, 0, self.config["dim"])
        embedding = self.embed(label, self.conditions.read(cond, x, self.training))
        h = self.enter(x)
        for norm, modulate, first, second in zip(self.norm, self.modulate, self.first, self.second, strict=True):
            scale, shift = modulate(embedding).chunk(2, 1)
            inner = torch.addcmul(shift, norm(h), 1 + scale)
            h = h + second(self.dropout(F.silu(first(F.silu(inner)))))
        return self.leave(F.silu(h))
