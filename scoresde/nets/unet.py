"""A lean U-Net for 1, 2 or 3 spatial axes. Layer 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import CONV, UP_CONV, AttentionBlock, NoiseEmbedding, ResBlock, zero_


class UNet(nn.Module):
    """Residual blocks down, residual blocks up, one skip per resolution; attention at the coarsest.

    Arguments:
        in_channels, out_channels: of the data as the network sees them.
        size: spatial shape, for example (8, 8); it fixes the position maps and must halve len(channels) - 1 times.
        channels: width at each resolution, finest first.
        blocks: residual blocks at each resolution; all but the coarsest have them on the way down and up again.
        attention: put one attention block in the middle of the coarsest resolution.
        positions: channels of a learned map that is appended to the input.
        embedding: width of the noise embedding.
        cond_dim: size of an optional condition vector (B, cond_dim); a missing one counts as zeros.
        dropout: probability, in every block.

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
        dropout: float = 0.1,
    ):
        super().__init__()
        size, channels, blocks = tuple(size), tuple(channels), tuple(blocks)
        rank, halvings = len(size), len(channels) - 1
        if rank not in CONV:
            raise ValueError(f"size must have 1, 2 or 3 spatial axes, got {size}.")
        if len(blocks) != len(channels) or not channels:
            raise ValueError(f"channels and blocks must have one entry per resolution, got {channels} and {blocks}.")
        if any(n % 2**halvings for n in size):
            raise ValueError(f"size {size} cannot be halved {halvings} times; use fewer resolutions or pad the data.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
        self.config = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            size=size,
            channels=channels,
            blocks=blocks,
            attention=attention,
            positions=positions,
            embedding=embedding,
            cond_dim=cond_dim,
            dropout=dropout,
        )
        conv = CONV[rank]
        self.embed = NoiseEmbedding(embedding, cond_dim)
        self.position_map = nn.Parameter(0.1 * torch.randn(1, positions, *size)) if positions else None
        self.enter = conv(in_channels + positions, channels[0], 3, padding=1)
        block = lambda c_in, c_out: ResBlock(rank, c_in, c_out, embedding, dropout)  # noqa: E731
        fine = list(zip(channels[:-1], channels[1:], blocks[:-1], strict=True))
        self.down = nn.ModuleList(nn.ModuleList(block(c, c) for _ in range(n)) for c, _, n in fine)
        self.shrink = nn.ModuleList(conv(c, wider, 2, stride=2) for c, wider, _ in fine)
        middle: list[nn.Module] = [block(channels[-1], channels[-1]) for _ in range(blocks[-1])]
        if attention:
            coarse = math.prod(n // 2**halvings for n in size)
            middle.insert(len(middle) // 2, AttentionBlock(channels[-1], embedding, coarse, dropout))
        self.middle = nn.ModuleList(middle)
        self.grow = nn.ModuleList(UP_CONV[rank](wider, c, 2, stride=2) for c, wider, _ in fine)
        self.up = nn.ModuleList(
            nn.ModuleList(block(2 * c if i == 0 else c, c) for i in range(max(n, 1))) for c, _, n in fine
        )
        self.norm = nn.GroupNorm(math.gcd(8, channels[0]), channels[0])
        self.leave = zero_(conv(channels[0], out_channels, 3, padding=1))

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        embedding = self.embed(label, cond)
        if self.position_map is not None:
            x = torch.cat([x, self.position_map.expand(x.shape[0], *self.position_map.shape[1:])], 1)
        h = self.enter(x)
        skips = []
        for stage, shrink in zip(self.down, self.shrink, strict=True):
            for block in stage:
                h = block(h, embedding)
            skips.append(h)
            h = shrink(h)
        for block in self.middle:
            h = block(h, embedding)
        for stage, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            h = torch.cat([skips.pop(), grow(h)], 1)
            for block in stage:
                h = block(h, embedding)
        return self.leave(F.silu(self.norm(h)))
