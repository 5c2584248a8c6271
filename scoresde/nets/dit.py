"""The diffusion transformer of Peebles & Xie (2023) with adaLN-Zero, for 1, 2 or 3 spatial axes. Layer 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import CONV, arguments, attend, check_input, tuples, xavier_, zero_
from scoresde.nets.embedding import NoiseEmbedding

POSITIONS = ("sincos", "rotary")
EPS = 1e-6
Turn = tuple[Tensor, Tensor]


class DiT(nn.Module):
    """Attention and MLPs on patches, modulated by the noise level: `forward(x, label, cond=None)`.

    x (B, in_channels, *size), label (B,) -> (B, out_channels, *size). The output layer and all gates start at zero.
    `cond` as in `NoiseEmbedding`; it is added to the noise features.

    Arguments:
        in_channels, out_channels: of the data as the network sees them.
        size: spatial shape, for example (32, 32); its length is the rank.
        patch: side of a patch, one number or one per axis; it divides `size`.
        width, depth, heads: channels of a patch, blocks, attention heads in each.
        mlp_ratio: hidden channels of the MLPs, over width.
        positions: "sincos" adds fixed sines and cosines of the patch's coordinates, width / rank channels for each
            axis, the last axis first, so that width is a multiple of 2 * rank; x must have `size`. "rotary" turns
            queries and keys instead (Su et al. 2021), as many pairs of a head's channels for each axis, pairs left
            over not at all; attention then sees differences of positions, and sizes other than `size` work if `patch`
            divides them.
        embedding, frequencies, fourier_scale: kind, number and scale of the noise features.
        classes, cond_dim, drop_cond: conditions, see `NoiseEmbedding`.
        shared_embedding: one noise embedding for all, or one for each block, of which the output layer has the first's.
        dropout: probability, after attention and inside the MLPs.
        mlp_eps: of the layer norms before the MLPs; the others have 1e-6.

    DiT-S, B, L and XL of the paper are width, depth, heads = (384, 12, 6), (768, 12, 12), (1024, 24, 16) and
    (1152, 28, 16). Raises `ValueError` for options that do not fit each other or the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: Sequence[int],
        *,
        patch: int | Sequence[int] = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        positions: str = "sincos",
        embedding: str = "positional",
        frequencies: int = 128,
        fourier_scale: float = 16.0,
        classes: int = 0,
        cond_dim: int = 0,
        drop_cond: float = 0.0,
        shared_embedding: bool = True,
        dropout: float = 0.0,
        mlp_eps: float = EPS,
    ):
        given = arguments(locals())
        super().__init__()
        self.config = given
        (size,) = tuples(size=size)
        patch = (patch,) * len(size) if isinstance(patch, int) else tuple(patch)
        _check(given, size, patch)
        self.size, self.patch, self.heads = size, patch, heads

        def embed(drop: float) -> NoiseEmbedding:
            return _as_published(
                NoiseEmbedding(
                    width,
                    cond_dim,
                    frequencies,
                    classes=classes,
                    drop_cond=drop,
                    kind=embedding,
                    scale=fourier_scale,
                    join="output",
                )
            )

        # with several embeddings the drawing is ours: all blocks of an example must lose its condition together
        self.drop_cond = 0.0 if shared_embedding else drop_cond
        self.embed = embed(drop_cond) if shared_embedding else nn.ModuleList(embed(0.0) for _ in range(depth))
        self.enter = CONV[len(size)](in_channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.enter.weight.flatten(1))  # as the linear layer that it is
        nn.init.zeros_(self.enter.bias)
        grid = [n // p for n, p in zip(size, patch, strict=True)]
        table = _sincos(grid, width) if positions == "sincos" else None
        self.register_buffer("positions", table, persistent=False)  # follows from the arguments
        self.blocks = nn.ModuleList(_Block(width, heads, mlp_ratio, dropout, mlp_eps) for _ in range(depth))
        self.modulate = zero_(nn.Linear(width, 2 * width))
        self.leave = zero_(nn.Linear(width, math.prod(patch) * out_channels))

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        check_input(x, label, len(self.size), self.config["in_channels"])
        grid = self._grid(x)
        embedded = self._embedded(label, cond)
        # under autocast the sum over the blocks keeps the parameters' precision
        h = self.enter(x).flatten(2).transpose(1, 2).to(self.enter.weight.dtype)
        turn = None
        if self.positions is None:
            turn = _turn(grid, h.shape[-1] // self.heads // 2, h)
        else:
            h = h + self.positions
        for block, features in zip(self.blocks, embedded, strict=True):
            h = block(h, features, turn)
        shift, scale = self.modulate(embedded[0])[:, None].chunk(2, -1)
        return self._unpatch(self.leave(_modulated(h, shift, scale, EPS)), grid)

    def _grid(self, x: Tensor) -> list[int]:
        """Patches along each axis of x, after checking its size."""
        size = tuple(x.shape[2:])
        if self.positions is not None and size != self.size:
            raise ValueError(
                f"the sine-cosine positions of this network are those of size {self.size}, got {size}; only a network "
                "with positions='rotary' works at several sizes."
            )
        if any(n % p for n, p in zip(size, self.patch, strict=True)):
            raise ValueError(f"each spatial axis must be a multiple of its patch, {self.patch}; got {size}.")
        return [n // p for n, p in zip(size, self.patch, strict=True)]

    def _embedded(self, label: Tensor, cond: Any) -> list[Tensor]:
        """The noise features (B, width) for each block."""
        if isinstance(self.embed, NoiseEmbedding):
            return [self.embed(label, cond)] * len(self.blocks)
        embedded = [embed(label, cond) for embed in self.embed]
        if self.training and self.drop_cond and cond is not None:
            dropped = torch.rand(len(label), 1, device=label.device) < self.drop_cond
            embedded = [torch.where(dropped, embed(label), h) for embed, h in zip(self.embed, embedded, strict=True)]
        return embedded

    def _unpatch(self, h: Tensor, grid: list[int]) -> Tensor:
        """(B, n, channels of whole patches), the image's channels fastest -> (B, out_channels, *size)."""
        rank = len(grid)
        h = h.reshape(h.shape[0], *grid, *self.patch, -1)
        order = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
        size = [n * p for n, p in zip(grid, self.patch, strict=True)]
        return h.permute(0, 1 + 2 * rank, *order).reshape(h.shape[0], -1, *size)


class _Block(nn.Module):
    """Attention and an MLP, each between a modulated layer norm and a gate; (B, n, c), (B, c) -> (B, n, c)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, mlp_eps: float):
        super().__init__()
        self.heads, self.mlp_eps = heads, mlp_eps
        hidden = int(width * mlp_ratio)
        self.modulate = zero_(nn.Linear(width, 6 * width))
        self.qkv = xavier_(nn.Linear(width, 3 * width))
        self.out = xavier_(nn.Linear(width, width))
        self.first = xavier_(nn.Linear(width, hidden))
        self.second = xavier_(nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, embedded: Tensor, turn: Turn | None) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulate(embedded)[:, None].chunk(6, -1)
        h = h + gate * self.dropout(self._attention(_modulated(h, shift, scale, EPS), turn))
        inner = self.first(_modulated(h, mlp_shift, mlp_scale, self.mlp_eps))
        return h + mlp_gate * self.second(self.dropout(F.gelu(inner, approximate="tanh")))

    def _attention(self, h: Tensor, turn: Turn | None) -> Tensor:
        b, n, c = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if turn is not None:
            q, k = _turned(q, turn), _turned(k, turn)
        return self.out(attend(q, k, v, self.training).transpose(1, 2).reshape(b, n, c))


def _modulated(h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=eps) * (1 + scale) + shift


def _as_published(embed: NoiseEmbedding) -> NoiseEmbedding:
    """The embedding with the initial weights of the paper's code: smaller than those of the other layers."""
    for layer in (embed.first, embed.second):
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    if embed.cond is not None:
        xavier_(embed.cond)
    return embed


def _sincos(grid: Sequence[int], width: int) -> Tensor:
    """(n, width): for each axis, the last first, sines and then cosines of the coordinate at geometric frequencies."""
    pairs = width // (2 * len(grid))
    wide = dict(dtype=torch.float64, device="cpu")  # for devices without float64
    omega = 10000 ** -(torch.arange(pairs, **wide) / pairs)
    axes = torch.meshgrid(*(torch.arange(n, **wide) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in reversed(axes)]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
    return table.float().to(torch.get_default_device())


def _turn(grid: Sequence[int], pairs: int, like: Tensor) -> Turn:
    """Cosine and sine (n, pairs) of the angles by which rotary positions turn the pairs of a head's channels.

    Computed anew each time, which costs little beside the blocks: a buffer would be rounded with a bfloat16 network,
    and angles of many radians need more digits than that.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    each = pairs // len(grid)
    omega = 10000 ** -(torch.arange(each, dtype=dtype, device=like.device) / each)
    axes = torch.meshgrid(*(torch.arange(n, dtype=dtype, device=like.device) for n in grid), indexing="ij")
    angle = F.pad(torch.cat([axis.reshape(-1, 1) * omega for axis in axes], 1), (0, pairs - each * len(grid)))
    return angle.cos(), angle.sin()


def _turned(u: Tensor, turn: Turn) -> Tensor:
    """u (B, heads, n, d), whose channels i and i + d / 2 are a pair, in the dtype that it came in."""
    cos, sin = turn
    a, b = u.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(u.dtype)


def _check(given: dict, size: tuple, patch: tuple) -> None:
    rank, width, heads = len(size), given["width"], given["heads"]
    if rank not in CONV:
        raise ValueError(f"size must have 1, 2 or 3 spatial axes, got {size}.")
    if len(patch) != rank or min(patch) < 1:
        raise ValueError(f"patch must be one positive number or {rank} of them, one per axis; got {given['patch']}.")
    if any(n % p for n, p in zip(size, patch, strict=True)) or min(size) < 1:
        raise ValueError(f"patch {given['patch']} does not divide size {size}; use another patch or pad the data.")
    if min(width, heads, given["depth"]) < 1 or int(width * given["mlp_ratio"]) < 1:
        raise ValueError(
            f"width, depth, heads and mlp_ratio must be positive, got {width}, {given['depth']}, {heads} and "
            f"{given['mlp_ratio']}."
        )
    if width % heads:
        raise ValueError(f"width ({width}) must be a multiple of heads ({heads}).")
    if given["positions"] not in POSITIONS:
        raise ValueError(f"unknown positions {given['positions']!r}; use one of {', '.join(POSITIONS)}.")
    if given["positions"] == "sincos" and width % (2 * rank):
        raise ValueError(f"sine-cosine positions along {rank} axes need a width that {2 * rank} divides, got {width}.")
    channels = width // heads
    if given["positions"] == "rotary" and (channels % 2 or channels < 2 * rank):
        raise ValueError(
            f"rotary positions along {rank} axes need an even number of channels per head, {2 * rank} or more; got "
            f"width / heads = {channels}."
        )
    for name in ("dropout", "drop_cond"):
        if not 0.0 <= given[name] < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {given[name]}.")
