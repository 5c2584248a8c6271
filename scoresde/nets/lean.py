"""A lean U-Net for small images, 1, 2 or 3 spatial axes: half the depth of the published ones. Layer 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import CONV, check_input, spread, through, zero_
from scoresde.nets.conditioning import ConditionalEmbedding, Conditions
from scoresde.nets.options import arguments
from scoresde.nets.resample import check_padding, crop, pad_to_multiple

MOST_BLOCKS = 512
UP_CONV = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class LeanBlock(nn.Module):
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
        scale, shift = spread(self.modulate(embedding), x).chunk(2, 1)
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


class LeanUNet(nn.Module):
    """Residual blocks down, residual blocks up, one skip per resolution; attention at the coarsest.

    Arguments:
        in_channels, out_channels: of the data as the network sees them.
        size: spatial shape of all inputs, for example (8, 8); it must halve len(channels) - 1 times unless `pad` is set.
        channels: width at each resolution, finest first.
        blocks: residual blocks at each resolution; all but the coarsest have them on the way down and up again.
        attention: put one attention block in the middle of the coarsest resolution.
        positions: channels of a learned map that is appended to the input.
        embedding: width of the noise embedding.
        cond_dim, classes, numbers, tokens, pooled, spatial, drop_cond: the conditions that the network takes (`cond_dim` is
            the number of features), see `Conditions`.
        dropout: probability, in every block.
        pad: surround x (and the spatial condition) by zeros up to the next size that halves, and crop the result; the position
            maps are those of the padded size.

    `forward(x, label, cond=None)`: x (B, in_channels, *size), label (B,) -> (B, out_channels, *size). The output layer
    starts at zero. `config` holds the arguments, to save the network by.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: Sequence[int],
        *,
        channels: Sequence[int] = (32, 64),
        blocks: Sequence[int] = (2, 4),
        attention: bool = True,
        positions: int = 8,
        embedding: int = 128,
        cond_dim: int = 0,
        classes: int = 0,
        numbers: int = 0,
        tokens: int = 0,
        pooled: int = 0,
        spatial: int = 0,
        drop_cond: float | Mapping[str, float] = 0.0,
        dropout: float = 0.1,
        pad: bool = False,
    ):
        given = arguments(locals(), blocks=(0, MOST_BLOCKS))
        super().__init__()
        self.config = given
        _check(given["size"], given["channels"], given["blocks"], pad)
        rank, factor = len(size), 2 ** (len(channels) - 1)
        padded = [n + -n % factor for n in size]
        self.size, self.factor, self.pad = given["size"], factor, pad
        conv = CONV[rank]
        self.conditions = Conditions.of(given)
        self.embed = ConditionalEmbedding(embedding, self.conditions)
        self.position_map = nn.Parameter(0.1 * torch.randn(1, positions, *padded)) if positions else None
        self.enter = conv(in_channels + spatial + positions, channels[0], 3, padding=1)
        block = lambda c_in, c_out: LeanBlock(rank, c_in, c_out, embedding, dropout)  # noqa: E731
        fine = list(zip(channels[:-1], channels[1:], blocks[:-1], strict=True))
        self.down = nn.ModuleList(nn.ModuleList(block(c, c) for _ in range(n)) for c, _, n in fine)
        self.shrink = nn.ModuleList(conv(c, wider, 2, stride=2) for c, wider, _ in fine)
        middle: list[nn.Module] = [block(channels[-1], channels[-1]) for _ in range(blocks[-1])]
        if attention:
            coarse = math.prod(n // factor for n in padded)
            middle.insert(len(middle) // 2, AttentionBlock(channels[-1], embedding, coarse, dropout))
        self.middle = nn.ModuleList(middle)
        self.grow = nn.ModuleList(UP_CONV[rank](wider, c, 2, stride=2) for c, wider, _ in fine)
        self.up = nn.ModuleList(
            nn.ModuleList(block(2 * c if i == 0 else c, c) for i in range(max(n, 1))) for c, _, n in fine
        )
        self.norm = nn.GroupNorm(math.gcd(8, channels[0]), channels[0])
        self.leave = zero_(conv(channels[0], out_channels, 3, padding=1))

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        check_input(x, label, len(self.size), self.config["in_channels"])
        size = self._check_size(x)
        parts = self.conditions.read(cond, x, self.training)
        embedding = self.embed(label, parts)
        x = pad_to_multiple(parts.beside(x), (self.factor,) * len(size))
        if self.position_map is not None:
            x = torch.cat([x, self.position_map.expand(x.shape[0], *self.position_map.shape[1:])], 1)
        h = self.enter(x)
        skips = []
        for stage, shrink in zip(self.down, self.shrink, strict=True):
            h = through(stage, h, embedding)
            skips.append(h)
            h = shrink(h)
        h = through(self.middle, h, embedding)
        for stage, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            h = through(stage, torch.cat([skips.pop(), grow(h)], 1), embedding)
        return crop(self.leave(F.silu(self.norm(h))), size)

    def _check_size(self, x: Tensor) -> tuple[int, ...]:
        """The spatial size of x, if the network takes it."""
        size = tuple(x.shape[2:])
        if size != self.size and (self.position_map is not None or self.config["attention"]):
            raise ValueError(
                f"the position maps and attention of this network are those of size {self.size}, got {size}."
            )
        if not self.pad and any(n % self.factor for n in size):
            raise ValueError(
                f"every spatial axis must be a multiple of {self.factor}, got {size}; or build it with pad=True."
            )
        return size


def _check(size: tuple[int, ...], channels: tuple[int, ...], blocks: tuple[int, ...], pad: bool) -> None:
    halvings = len(channels) - 1
    if len(size) not in CONV:
        raise ValueError(f"size must have 1, 2 or 3 spatial axes, got {size}.")
    if len(blocks) != len(channels) or not channels:
        raise ValueError(f"channels and blocks must have one entry per resolution, got {channels} and {blocks}.")
    if sum(blocks) > MOST_BLOCKS:
        raise ValueError(f"blocks must be at most {MOST_BLOCKS} together, got {blocks}.")
    if not pad and any(n % 2**halvings for n in size):
        raise ValueError(
            f"size {size} cannot be halved {halvings} times; use fewer resolutions, or pad=True to pad inside the network."
        )
    check_padding(size, halvings)
