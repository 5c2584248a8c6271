"""Building blocks of the networks, for 1, 2 or 3 spatial axes. Layer 0: nothing here knows of SDEs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
UP_CONV = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def zero_(module: nn.Module) -> nn.Module:
    """The module with weight and bias at zero, so that its block starts as the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class NoiseEmbedding(nn.Module):
    """A noise label (B,) and an optional condition (B, cond_dim) -> (B, width).

    Sines and cosines of the label at `frequencies` fixed frequencies, spaced geometrically between 0.27 and 24 rad per
    unit, through a two-layer perceptron that the condition joins linearly. A missing condition counts as zeros.
    """

    def __init__(self, width: int, cond_dim: int = 0, frequencies: int = 16):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(-1.3, 3.2, frequencies)))
        self.first = nn.Linear(2 * frequencies, width)
        self.second = nn.Linear(width, width)
        self.cond_dim = cond_dim
        self.cond = nn.Linear(cond_dim, width, bias=False) if cond_dim else None

    def forward(self, label: Tensor, cond: Tensor | None = None) -> Tensor:
        angle = label[:, None] * self.frequencies.to(label.dtype)
        h = self.first(torch.cat([angle.sin(), angle.cos()], 1).to(self.first.weight.dtype))
        if cond is not None:
            if self.cond is None:
                raise ValueError("this network was built without conditions (cond_dim=0), but was given one.")
            if cond.dim() != 2 or tuple(cond.shape) != (label.shape[0], self.cond_dim):
                raise ValueError(
                    f"cond must have shape ({label.shape[0]}, {self.cond_dim}) for this network, got {tuple(cond.shape)}."
                )
            h = h + self.cond(cond.to(h.dtype))
        return F.silu(self.second(F.silu(h)))


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the embedding scales and shifts the second norm (adaptive group norm)."""

    def __init__(self, rank: int, channels: int, out: int, embedding: int, dropout: float, groups: int = 8):
        super().__init__()
        conv = CONV[rank]
        self.norm1 = nn.GroupNorm(math.gcd(groups, channels), channels)
        self.conv1 = conv(channels, out, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * out)
        self.norm2 = nn.GroupNorm(math.gcd(groups, out), out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(conv(out, out, 3, padding=1))
        self.skip = conv(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(embedding).reshape(x.shape[0], -1, *(1,) * (x.dim() - 2)).chunk(2, 1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.skip(x) + self.conv2(self.dropout(h))


class AttentionBlock(nn.Module):
    """A transformer block over all positions: attention with a learned bias per pair of positions, then a perceptron.

    Both halves are pre-normed and modulated by the embedding. `positions` is the number of spatial positions, which the
    bias fixes. The attention is written out, so that every order of derivative exists on every device.
    """

    def __init__(
        self, channels: int, embedding: int, positions: int, dropout: float, heads: int = 4, expansion: int = 2
    ):
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels ({channels}) must be a multiple of heads ({heads}).")
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(channels, elementwise_affine=False)
        self.modulate = nn.Linear(embedding, 4 * channels)
        nn.init.normal_(self.modulate.weight, std=0.02)
        nn.init.zeros_(self.modulate.bias)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.bias = nn.Parameter(torch.zeros(heads, positions, positions))
        self.out = zero_(nn.Linear(channels, channels))
        self.wide = nn.Linear(channels, expansion * channels)
        self.narrow = zero_(nn.Linear(expansion * channels, channels))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, positions, channels)
        b, n, c = x.shape
        scale1, shift1, scale2, shift2 = self.modulate(embedding)[:, None].chunk(4, 2)
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5 + self.bias, -1)
        x = x + self.dropout(self.out((weights @ v).transpose(1, 2).reshape(b, n, c)))
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        x = x + self.dropout(self.narrow(F.gelu(self.wide(h), approximate="tanh")))
        return x.transpose(1, 2).reshape(shape)
