"""The U-Net of the field, with the options of DDPM, DDPM++, NCSN++ and ADM, for 1, 2 or 3 spatial axes. Layer 0."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import CONV, ResBlock, SelfAttention, arguments, check_input, tuples, xavier_, zero_
from scoresde.nets.embedding import NoiseEmbedding
from scoresde.nets.resample import ConvDown, ConvUp, Down, Plain, Up

CHOICES = {
    "residual": ("biggan", "ddpm"),
    "resample": ("mean", "fir", "conv", "conv_centred"),
    "modulation": ("shift", "scale_shift"),
    "attention_up": ("last", "all"),
    "progressive_input": ("none", "skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "progressive_output": ("none", "skip", "residual"),
}


class Stage(nn.Module):
    """One resolution of one way: residual blocks, each followed by attention or nothing, and what leads to the next.

    `resample` goes to the next resolution, `pyramid` joins the progressive image there (see `UNet`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleList()
        self.pyramid: nn.Module | None = None
        self.resample: nn.Module | None = None


class UNet(nn.Module):
    """Residual blocks down and up again, with a skip connection for each block: `forward(x, label, cond=None)`.

    x (B, in_channels, *size), label (B,) -> (B, out_channels, *size); the output layer starts at zero. `cond` as in
    `NoiseEmbedding`. Sizes other than `size` work too, if their axes can be halved as often.

    Arguments:
        in_channels, out_channels: of the data as the network sees them.
        size: spatial shape, for example (32, 32); its length is the rank, and `attention` refers to it.
        width, multipliers: channels at resolution i are width * multipliers[i], finest first.
        blocks: residual blocks at each resolution on the way down; one more on the way up.
        attention: lengths of the last axis at which there is self-attention, besides the middle, which has it where
            `middle_attention`. On the way up after the last block or after all (`attention_up`).
        heads, head_channels: attention heads, or their channels in place of their number.
        residual, resample: "biggan" changes the resolution inside a residual block by "mean" or "fir" (with `taps`);
            "ddpm" by a layer of its own: by these, or by a strided convolution ("conv", or "conv_centred" padded evenly).
        project_resampled: a 1x1 convolution in the skip of a block that changes the resolution.
        modulation: the noise embedding shifts, or scales and shifts (adaptive group norm).
        rescale_skips: divide the sum of each residual connection by sqrt(2).
        progressive_input: the image at each resolution joins the features through a 1x1 convolution, summed or
            concatenated ("skip", `progressive_combine`), or as a residual network of its own ("residual"). `progressive_output`:
            the result is the sum over all resolutions ("skip"), or a residual network runs along ("residual").
        embedding, frequencies, fourier_scale: kind, number and scale of the noise features, width / 2 by default.
        embedding_width: 4 * width by default.
        classes, cond_dim, drop_cond, join, null_class: conditions, see `NoiseEmbedding`.
        group_channels, max_groups, eps: group norms have min(max_groups, channels // group_channels) groups. Where
            `attention_groups` is given, this many have, at the resolutions with attention, the attention's norms and on the way up
            the first norms of the blocks (as diffusers counts them in NCSN++; the same from 128 channels on).
        dropout: probability, in every residual block.
        rescale_input: the data lie in [0, 1] and the network sees 2 x - 1, as NCSN++ does.

    Papers: Ho et al. 2020 (DDPM), Song et al. 2021 (DDPM++, NCSN++: appendix H), Dhariwal & Nichol 2021 (ADM), Karras et al.
    2022 (EDM). Raises `ValueError` for options that do not fit each other or the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: Sequence[int],
        *,
        width: int = 128,
        multipliers: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        attention_up: str = "last",
        middle_attention: bool = True,
        heads: int = 1,
        head_channels: int | None = None,
        residual: str = "biggan",
        resample: str = "mean",
        taps: Sequence[float] = (1, 3, 3, 1),
        project_resampled: bool = True,
        modulation: str = "shift",
        rescale_skips: bool = True,
        progressive_input: str = "none",
        progressive_combine: str = "sum",
        progressive_output: str = "none",
        embedding: str = "positional",
        frequencies: int | None = None,
        fourier_scale: float = 16.0,
        embedding_width: int | None = None,
        classes: int = 0,
        cond_dim: int = 0,
        drop_cond: float = 0.0,
        join: str = "hidden",
        null_class: bool = True,
        group_channels: int = 4,
        max_groups: int = 32,
        attention_groups: int | None = None,
        eps: float = 1e-6,
        dropout: float = 0.0,
        rescale_input: bool = False,
    ):
        given = arguments(locals())
        super().__init__()
        self.config = given
        size, multipliers, attention, taps = tuples(size=size, multipliers=multipliers, attention=attention, taps=taps)
        _check(given, size, multipliers, attention)
        rank, levels = len(size), len(multipliers)
        lengths = [size[-1] // 2**i for i in range(levels)]
        widths = [round(width * m) for m in multipliers]
        self.rank, self.rescale_input, self.factor = rank, rescale_input, 2 ** (levels - 1)

        if frequencies is None:
            frequencies = width if embedding == "fourier" else max(width // 2, 1)
        embedding_width = 4 * width if embedding_width is None else embedding_width
        norm = functools.partial(_norm, group_channels=group_channels, max_groups=max_groups, eps=eps)
        attention_norm = norm
        if attention_groups:
            attention_norm = functools.partial(_norm, group_channels=1, max_groups=attention_groups, eps=eps)
        self.embed = NoiseEmbedding(
            embedding_width,
            cond_dim,
            frequencies,
            classes=classes,
            drop_cond=drop_cond,
            kind=embedding,
            scale=fourier_scale,
            join=join,
            null_class=null_class,
        )
        block = functools.partial(
            ResBlock,
            rank,
            embedding=embedding_width,
            norm=norm,
            dropout=dropout,
            modulation=modulation,
            rescale=rescale_skips,
            project=project_resampled,
        )
        fir = taps if resample == "fir" else None

        def attend(c: int, middle: bool = False) -> nn.Module:
            if head_channels and head_channels > c:
                raise ValueError(f"head_channels={head_channels} is more than the {c} channels that attend.")
            here = norm if middle else attention_norm
            return SelfAttention(c, here, c // head_channels if head_channels else heads, rescale_skips)

        def change(c: int, up: bool) -> nn.Module:
            if resample in ("mean", "fir"):
                module = (Up if up else Down)(rank, fir or (1, 1))
                return block(c_in=c, c_out=c, resample=module) if residual == "biggan" else Plain(module)
            return ConvUp(rank, c, c) if up else ConvDown(rank, c, c, centred=resample == "conv_centred")

        self.enter = xavier_(CONV[rank](in_channels, width, 3, padding=1))
        self.down, skips, c, c_image = nn.ModuleList(), [width], width, in_channels
        for i in range(levels):
            stage = Stage()
            for _ in range(blocks):
                stage.blocks.append(block(c_in=c, c_out=widths[i]))
                c = widths[i]
                stage.attention.append(attend(c) if lengths[i] in attention else nn.Identity())
                skips.append(c)
            if i < levels - 1:
                stage.resample = change(c, up=False)
                if progressive_input == "skip":
                    stage.pyramid = _SkipInput(rank, c_image, c, fir, progressive_combine)
                    c *= 2 if progressive_combine == "cat" else 1
                elif progressive_input == "residual":
                    stage.pyramid = _ResidualInput(rank, c_image, c, fir, rescale_skips)
                    c_image = c
                skips.append(c)
            self.down.append(stage)

        self.middle = nn.ModuleList(
            [block(c_in=c, c_out=c), attend(c, middle=True) if middle_attention else nn.Identity()]
        )
        self.middle.append(block(c_in=c, c_out=c))

        self.up, c_image = nn.ModuleList(), 0
        for i in reversed(range(levels)):
            stage = Stage()
            for k in range(blocks + 1):
                joined = c + skips.pop()
                stage.blocks.append(block(c_in=joined, c_out=widths[i]))
                if lengths[i] in attention:
                    stage.blocks[-1].norm1 = attention_norm(joined)
                c = widths[i]
                here = lengths[i] in attention and (attention_up == "all" or k == blocks)
                stage.attention.append(attend(c) if here else nn.Identity())
            if progressive_output == "skip":
                stage.pyramid = _SkipOutput(rank, c, out_channels, norm, None if i == levels - 1 else fir or (1, 1))
            elif progressive_output == "residual":
                stage.pyramid = _ResidualOutput(rank, c_image, c, norm, fir, rescale_skips)
                c_image = c
            if i:
                stage.resample = change(c, up=True)
            self.up.append(stage)
        self.leave = None if progressive_output == "skip" else _Head(rank, c, out_channels, norm)

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        check_input(x, label, self.rank, self.config["in_channels"])
        if any(n % self.factor for n in x.shape[2:]):
            raise ValueError(
                f"this network halves its input {self.factor.bit_length() - 1} times: every spatial axis must be a "
                f"multiple of {self.factor}, got {tuple(x.shape[2:])}."
            )
        embedding = self.embed(label, cond)
        if self.rescale_input:
            x = 2 * x - 1
        image, h = x, self.enter(x)
        skips = [h]
        for stage in self.down:
            for block, attention in zip(stage.blocks, stage.attention, strict=True):
                h = attention(block(h, embedding))
                skips.append(h)
            if stage.resample is not None:
                h = stage.resample(h, embedding)
                if stage.pyramid is not None:
                    image, h = stage.pyramid(image, h)
                skips.append(h)
        first, attention, second = self.middle
        h = second(attention(first(h, embedding)), embedding)
        image = None
        for stage in self.up:
            for block, attention in zip(stage.blocks, stage.attention, strict=True):
                h = attention(block(torch.cat([h, skips.pop()], 1), embedding))
            if stage.pyramid is not None:
                image, h = stage.pyramid(image, h)
            if stage.resample is not None:
                h = stage.resample(h, embedding)
        return image if self.leave is None else self.leave(h)


class _Head(nn.Module):
    """Norm, SiLU, convolution; zero at the start."""

    def __init__(self, rank: int, c_in: int, c_out: int, norm: Any):
        super().__init__()
        self.norm = norm(c_in)
        self.conv = zero_(CONV[rank](c_in, c_out, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(h)))


class _SkipInput(nn.Module):
    """The halved image, through a 1x1 convolution, added to the features or put beside them."""

    def __init__(self, rank: int, c_image: int, c: int, taps: Sequence[float] | None, combine: str):
        super().__init__()
        self.down, self.cat = Down(rank, taps or (1, 1)), combine == "cat"
        self.conv = xavier_(CONV[rank](c_image, c, 1))

    def forward(self, image: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        image = self.down(image)
        joined = self.conv(image)
        return image, torch.cat([joined, h], 1) if self.cat else joined + h


class _ResidualInput(nn.Module):
    """A strided convolution of the image, to which the features are added; the sum is both from here on."""

    def __init__(self, rank: int, c_image: int, c: int, taps: Sequence[float] | None, rescale: bool):
        super().__init__()
        self.down, self.gain = ConvDown(rank, c_image, c, taps), 0.5**0.5 if rescale else 1.0

    def forward(self, image: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = (self.down(image) + h) * self.gain
        return h, h


class _SkipOutput(nn.Module):
    """This resolution's contribution to the image, added to the doubled one of the coarser resolutions."""

    def __init__(self, rank: int, c: int, c_out: int, norm: Any, taps: Sequence[float] | None):
        super().__init__()
        self.up = None if taps is None else Up(rank, taps)
        self.head = _Head(rank, c, c_out, norm)

    def forward(self, image: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(h) if self.up is None else self.up(image) + self.head(h), h


class _ResidualOutput(nn.Module):
    """A doubling convolution of the residual network's state, to which the features are added; the sum is both."""

    def __init__(self, rank: int, c_image: int, c: int, norm: Any, taps: Sequence[float] | None, rescale: bool):
        super().__init__()
        self.up = ConvUp(rank, c_image, c, taps) if c_image else None
        self.head = None if c_image else _Head(rank, c, c, norm)
        self.gain = 0.5**0.5 if rescale else 1.0

    def forward(self, image: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.up is None:
            return self.head(h), h
        h = (self.up(image) + h) * self.gain
        return h, h


def _norm(channels: int, group_channels: int, max_groups: int, eps: float) -> nn.GroupNorm:
    groups = max(1, min(max_groups, channels // group_channels))
    if channels % groups:
        raise ValueError(
            f"{channels} channels cannot be split into {groups} groups; choose width and multipliers so that all sums of "
            "channels can, or other group_channels and max_groups."
        )
    return nn.GroupNorm(groups, channels, eps=eps)


def _check(given: dict, size: tuple, multipliers: tuple, attention: tuple) -> None:
    if len(size) not in CONV:
        raise ValueError(f"size must have 1, 2 or 3 spatial axes, got {size}.")
    if not multipliers:
        raise ValueError("multipliers must have one entry per resolution, got none.")
    counts = ("in_channels", "out_channels", "width", "blocks", "heads", "group_channels", "max_groups")
    for name, values in (*((n, (given[n],)) for n in counts), ("size", size)):
        if any(v < 1 for v in values):
            raise ValueError(f"{name} must be at least 1, got {given[name]}.")
    if any(round(given["width"] * m) < 1 for m in multipliers):
        raise ValueError(f"multipliers {multipliers} of width {given['width']} must each give a channel at least.")
    halvings = len(multipliers) - 1
    if any(n % 2**halvings for n in size):
        raise ValueError(f"size {size} cannot be halved {halvings} times; use fewer multipliers or pad the data.")
    lengths = [size[-1] // 2**i for i in range(halvings + 1)]
    absent = [n for n in attention if n not in lengths]
    if absent:
        raise ValueError(f"attention={attention}: the resolutions of this network are {lengths}, not {absent}.")
    for name, choices in CHOICES.items():
        if given[name] not in choices:
            raise ValueError(f"unknown {name} {given[name]!r}; use one of {', '.join(choices)}.")
    if given["residual"] == "biggan" and given["resample"] not in ("mean", "fir"):
        raise ValueError("residual='biggan' resamples by 'mean' or 'fir'; a strided convolution needs residual='ddpm'.")
    if given["progressive_output"] == "residual" and given["resample"] not in ("fir", "conv", "mean"):
        raise ValueError("progressive_output='residual' needs resample 'fir', 'mean' or 'conv'.")
    if not 0.0 <= given["dropout"] < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {given['dropout']}.")
