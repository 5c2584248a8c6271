"""The diffusion transformer of Peebles & Xie (2023) with adaLN-Zero, for 1, 2 or 3 spatial axes. Layer 0."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import CONV, attend, check_input, xavier_, zero_
from scoresde.nets.conditioning import ConditionalEmbedding, ConditionParts, Conditions
from scoresde.nets.options import arguments, choices
from scoresde.nets.resample import crop, pad_to_multiple

POSITIONS = ("sincos", "rotary")
LARGEST_TABLE = 2**28  # numbers in the sine-cosine positions, a gigabyte
EPS = 1e-6
Rotation = tuple[Tensor, Tensor]


class DiT(nn.Module):
    """Attention and MLPs on patches, modulated by the noise level: `forward(x, label, cond=None)`.

    x (B, in_channels, *size), label (B,) -> (B, out_channels, *size). The output layer and all gates start at zero.
    `cond` as in `Conditions`; it joins the output of the noise embedding.

    Arguments:
        in_channels, out_channels: of the data as the network sees them.
        size: spatial shape, for example (32, 32); its length is the rank.
        patch: side of a patch, one number or one per axis; it divides `size`.
        width, depth, heads: channels of a patch, blocks, attention heads in each.
        mlp_ratio: hidden channels of the MLPs, over width.
        positions: "sincos" adds fixed sines and cosines of the patch's coordinates, width / rank channels for each
            axis, the last axis first, so that width is a multiple of 2 * rank; x must have `size`. "rotary" rotates
            queries and keys instead (Su et al. 2021), as many pairs of a head's channels for each axis, pairs left
            over not at all; attention then sees differences of positions, and sizes other than `size` work if `patch`
            divides them.
        embedding, frequencies, fourier_scale: kind, number and scale of the noise features.
        classes, cond_dim, numbers, tokens, pooled, spatial, drop_cond: the conditions that the network takes (`cond_dim` is
            the number of features), see `Conditions`.
        shared_embedding: one noise embedding for all, or one for each block, of which the output layer has the first's.
        dropout: probability, after attention and inside the MLPs.
        mlp_eps: of the layer norms before the MLPs; the others have 1e-6.
        pad: surround x by zeros up to the next multiple of the patch, and crop the result.

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
        numbers: int = 0,
        tokens: int = 0,
        pooled: int = 0,
        spatial: int = 0,
        drop_cond: float | Mapping[str, float] = 0.0,
        shared_embedding: bool = True,
        dropout: float = 0.0,
        mlp_eps: float = EPS,
        pad: bool = False,
    ):
        given = arguments(locals())
        super().__init__()
        self.config = given
        self.size: tuple[int, ...] = given["size"]
        self.patch: tuple[int, ...] = _per_axis(given["patch"], len(size))
        grid = _check(given, self.patch)
        self.heads, self.pad = heads, pad
        self.conditions = Conditions.of(given)

        def embed() -> ConditionalEmbedding:
            own = ConditionalEmbedding(
                width, self.conditions, frequencies, kind=embedding, scale=fourier_scale, join="output"
            )
            return _as_published(own)

        self.embed = embed() if shared_embedding else nn.ModuleList(embed() for _ in range(depth))
        self.enter = zero_(CONV[len(size)](in_channels + spatial, width, self.patch, stride=self.patch))
        nn.init.xavier_uniform_(self.enter.weight.flatten(1))  # as the linear layer that it is
        table = _sincos(grid, width) if positions == "sincos" else None
        self.register_buffer("positions", table, persistent=False)  # follows from the arguments
        self.blocks = nn.ModuleList(_Block(width, heads, mlp_ratio, dropout, mlp_eps) for _ in range(depth))
        self.modulate = zero_(nn.Linear(width, 2 * width))
        self.leave = zero_(nn.Linear(width, math.prod(self.patch) * out_channels))

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        check_input(x, label, len(self.size), self.config["in_channels"])
        size = self._check_size(x)
        parts = self.conditions.read(cond, x, self.training)
        embeddings = self._embeddings(label, parts)
        x = parts.beside(x)
        if self.pad:
            x = pad_to_multiple(x, self.patch)
        h = self.enter(x)
        grid = h.shape[2:]
        # under autocast the sum over the blocks keeps the parameters' precision
        h = h.flatten(2).transpose(1, 2).to(self.enter.weight.dtype)
        rotation = None
        if self.positions is None:
            rotation = _rotation(grid, h.shape[-1] // self.heads // 2, h)
        else:
            h = h + self.positions
        for block, embedding in zip(self.blocks, embeddings, strict=True):
            h = block(h, embedding, rotation)
        shift, scale = self.modulate(embeddings[0])[:, None].chunk(2, -1)
        return crop(self._unpatch(self.leave(_modulated(h, shift, scale, EPS)), grid), size)

    def _check_size(self, x: Tensor) -> tuple[int, ...]:
        """The spatial size of x, if the network takes it."""
        size = tuple(x.shape[2:])
        if self.positions is not None and size != self.size:
            raise ValueError(
                f"the sine-cosine positions of this network are those of size {self.size}, got {size}; only a network "
                "with positions='rotary' works at several sizes."
            )
        if not self.pad and any(n % p for n, p in zip(size, self.patch, strict=True)):
            raise ValueError(
                f"each spatial axis must be a multiple of its patch, {self.patch}; got {size}. A network built with "
                "pad=True takes any size."
            )
        return size

    def _embeddings(self, label: Tensor, parts: ConditionParts) -> list[Tensor]:
        """The embedding (B, width) of noise label and condition for each block."""
        if isinstance(self.embed, ConditionalEmbedding):
            return [self.embed(label, parts)] * len(self.blocks)
        return [embed(label, parts) for embed in self.embed]

    def _unpatch(self, h: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, n, channels of whole patches), the image's channels fastest -> (B, out_channels, *size)."""
        rank = len(grid)
        channels = self.config["out_channels"]  # not -1, which says nothing of an empty batch
        h = h.reshape(h.shape[0], *grid, *self.patch, channels)
        order = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
        size = [n * p for n, p in zip(grid, self.patch, strict=True)]
        return h.permute(0, 1 + 2 * rank, *order).reshape(h.shape[0], channels, *size)


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

    def forward(self, h: Tensor, embedding: Tensor, rotation: Rotation | None) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulate(embedding)[:, None].chunk(6, -1)
        h = h + gate * self.dropout(self._attention(_modulated(h, shift, scale, EPS), rotation))
        inner = self.first(_modulated(h, mlp_shift, mlp_scale, self.mlp_eps))
        return h + mlp_gate * self.second(self.dropout(F.gelu(inner, approximate="tanh")))

    def _attention(self, h: Tensor, rotation: Rotation | None) -> Tensor:
        b, n, c = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = _rotated(q, rotation), _rotated(k, rotation)
        return self.out(attend(q, k, v, self.training).transpose(1, 2).reshape(b, n, c))


def _per_axis(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else value


def _modulated(h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=eps) * (1 + scale) + shift


def _as_published(embed: ConditionalEmbedding) -> ConditionalEmbedding:
    """The embedding with the initial weights of the paper's code: smaller than those of the other layers."""
    for layer in (embed.first, embed.second):
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    for linear in (embed.cond, embed.numbers, embed.tokens, embed.pooled):
        if linear is not None:
            xavier_(linear)
    return embed


def _sincos(grid: Sequence[int], width: int) -> Tensor:
    """(n, width): for each axis, the last first, sines and then cosines of the coordinate at geometric frequencies."""
    if torch.get_default_device().type == "meta":
        return torch.empty(math.prod(grid), width)
    count = functools.partial(torch.arange, dtype=torch.float64, device="cpu")  # for devices without float64
    pairs = width // (2 * len(grid))
    omega = 10000 ** -(count(pairs) / pairs)
    axes = torch.meshgrid(*(count(n) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in reversed(axes)]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
    return table.float().to(torch.get_default_device())


def _rotation(grid: Sequence[int], pairs: int, like: Tensor) -> Rotation:
    """Cosine and sine (n, pairs) of the angles by which rotary positions rotate the pairs of a head's channels.

    Computed anew each time, which costs little beside the blocks: a buffer would be rounded with a bfloat16 network,
    and angles of many radians need more digits than that.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    each = pairs // len(grid)
    omega = 10000 ** -(torch.arange(each, dtype=dtype, device=like.device) / each)
    axes = torch.meshgrid(*(torch.arange(n, dtype=dtype, device=like.device) for n in grid), indexing="ij")
    angle = F.pad(torch.cat([axis.reshape(-1, 1) * omega for axis in axes], 1), (0, pairs - each * len(grid)))
    return angle.cos(), angle.sin()


def _rotated(u: Tensor, rotation: Rotation) -> Tensor:
    """u (B, heads, n, d), whose channels i and i + d / 2 are a pair, in the dtype that it came in."""
    cos, sin = rotation
    a, b = u.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(u.dtype)


def _check(given: dict[str, Any], patch: tuple[int, ...]) -> list[int]:
    """Patches along each axis; `ValueError` for options that do not fit each other."""
    size, width, heads = given["size"], given["width"], given["heads"]
    rank = len(size)
    if rank not in CONV:
        raise ValueError(f"size must have 1, 2 or 3 spatial axes, got {size}.")
    if len(patch) != rank:
        raise ValueError(f"patch must be one positive number or {rank} of them, one per axis; got {given['patch']}.")
    if not given["pad"] and any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(
            f"patch {given['patch']} does not divide size {size}; use another patch, or pad=True to pad inside the network."
        )
    grid = [-(-n // p) for n, p in zip(size, patch, strict=True)]
    if int(width * given["mlp_ratio"]) < 1:
        raise ValueError(f"mlp_ratio {given['mlp_ratio']} of width {width} must give a channel at least.")
    if width % heads:
        raise ValueError(f"width ({width}) must be a multiple of heads ({heads}).")
    choices(given, positions=POSITIONS)
    if given["positions"] == "sincos" and width % (2 * rank):
        raise ValueError(f"sine-cosine positions along {rank} axes need a width that {2 * rank} divides, got {width}.")
    if given["positions"] == "sincos" and math.prod(grid) * width > LARGEST_TABLE:
        raise ValueError(
            f"the sine-cosine positions of {math.prod(grid)} patches are too many to keep; use larger patches or "
            "positions='rotary'."
        )
    channels = width // heads
    if given["positions"] == "rotary" and (channels % 2 or channels < 2 * rank):
        raise ValueError(
            f"rotary positions along {rank} axes need an even number of channels per head, {2 * rank} or more; got "
            f"width / heads = {channels}."
        )
    return grid
