"""The parts of the U-Net: its encoder, middle and decoder from the options, and the progressive images. Layer 0."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import CONV, ResBlock, SelfAttention, xavier_, zero_
from scoresde.nets.resample import ConvDown, ConvUp, Down, Plain, Up

Norm = Callable[[int], nn.Module]


class Stage(nn.Module):
    """One resolution of one way: residual blocks, each followed by attention or nothing, and what leads to the next.

    `resample` goes to the next resolution, `pyramid` joins the progressive image there (see `UNet`). Both ways take the image,
    the features h, the noise embedding and the list of skip connections, and give the image and the features.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleList()
        self.pyramid: nn.Module | None = None
        self.resample: nn.Module | None = None


class DownStage(Stage):
    """On the way down: the result of every block, and of the resampling, is kept for the way up."""

    def forward(self, image: Tensor, h: Tensor, embedding: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(h, embedding))
            skips.append(h)
        if self.resample is not None:
            h = self.resample(h, embedding)
            if self.pyramid is not None:
                image, h = self.pyramid(image, h)
            skips.append(h)
        return image, h


class UpStage(Stage):
    """On the way up: every block is given the features beside what the way down kept last."""

    def forward(
        self, image: Tensor | None, h: Tensor, embedding: Tensor, skips: list[Tensor]
    ) -> tuple[Tensor | None, Tensor]:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(torch.cat([h, skips.pop()], 1), embedding))
        if self.pyramid is not None:
            image, h = self.pyramid(image, h)
        if self.resample is not None:
            h = self.resample(h, embedding)
        return image, h


class Layers:
    """What the options of a `UNet` say of its layers, by their channels.

    widths, lengths: channels, and the length of the last axis (where the data have been padded), at each resolution.
    c_image: channels that the first convolution sees. embedding: width of the noise embedding.
    """

    def __init__(self, options: dict[str, Any], lengths: Sequence[int], c_image: int, embedding: int):
        self.options, self.lengths, self.c_image = options, lengths, c_image
        self.rank = len(options["size"])
        self.widths = [round(options["width"] * m) for m in options["multipliers"]]
        self.fir: Sequence[float] | None = options["taps"] if options["resample"] == "fir" else None
        self.rescale: bool = options["rescale_skips"]
        self.norm: Norm = functools.partial(
            _norm, group_channels=options["group_channels"], max_groups=options["max_groups"], eps=options["eps"]
        )
        self.attention_norm = self.norm
        if options["attention_groups"]:
            self.attention_norm = functools.partial(
                _norm, group_channels=1, max_groups=options["attention_groups"], eps=options["eps"]
            )
        self.block = functools.partial(
            ResBlock,
            self.rank,
            embedding=embedding,
            norm=self.norm,
            dropout=options["dropout"],
            modulation=options["modulation"],
            rescale=self.rescale,
            project=options["project_resampled"],
        )

    def attends(self, i: int) -> bool:
        """Whether there is self-attention at resolution i."""
        return self.lengths[i] in self.options["attention"]

    def attention(self, c: int, norm: Norm) -> SelfAttention:
        heads, channels = self.options["heads"], self.options["head_channels"]
        if channels and channels > c:
            raise ValueError(f"head_channels={channels} is more than the {c} channels that attend.")
        if channels and c % channels:
            raise ValueError(f"head_channels={channels} does not divide the {c} channels that attend.")
        return SelfAttention(c, norm, c // channels if channels else heads, self.rescale)

    def resample(self, c: int, up: bool) -> nn.Module:
        """To the next finer resolution (`up`) or coarser one, called with the features and the noise embedding."""
        kind = self.options["resample"]
        if kind in ("mean", "fir"):
            module = (Up if up else Down)(self.rank, self.fir or (1, 1))
            return (
                self.block(c_in=c, c_out=c, resample=module) if self.options["residual"] == "biggan" else Plain(module)
            )
        if up:
            return ConvUp(self.rank, c, c)
        return ConvDown(self.rank, c, c, centred=kind == "conv_centred")


def encoder(layers: Layers) -> tuple[nn.ModuleList, list[int]]:
    """The way down, finest stage first, and the channels of everything that it hands to the way up; the last come in there."""
    options, last = layers.options, len(layers.widths) - 1
    stages, c, c_image = nn.ModuleList(), options["width"], layers.c_image
    skips = [c]
    for i, width in enumerate(layers.widths):
        stage = DownStage()
        for _ in range(options["blocks"]):
            stage.blocks.append(layers.block(c_in=c, c_out=width))
            c = width
            stage.attention.append(layers.attention(c, layers.attention_norm) if layers.attends(i) else nn.Identity())
            skips.append(c)
        if i < last:
            stage.resample = layers.resample(c, up=False)
            if options["progressive_input"] == "skip":
                stage.pyramid = SkipInput(layers.rank, c_image, c, layers.fir, options["progressive_combine"])
                c *= 2 if options["progressive_combine"] == "cat" else 1
            elif options["progressive_input"] == "residual":
                stage.pyramid = ResidualInput(layers.rank, c_image, c, layers.fir, layers.rescale)
                c_image = c
            skips.append(c)
        stages.append(stage)
    return stages, skips


def middle(layers: Layers, c: int) -> nn.ModuleList:
    """Block, attention or nothing, block, at the coarsest resolution."""
    first = layers.block(c_in=c, c_out=c)
    attention = layers.attention(c, layers.norm) if layers.options["middle_attention"] else nn.Identity()
    return nn.ModuleList([first, attention, layers.block(c_in=c, c_out=c)])


def decoder(layers: Layers, skips: list[int]) -> nn.ModuleList:
    """The way up, coarsest stage first; `skips` as `encoder` gives them."""
    options, last = layers.options, len(layers.widths) - 1
    stages, c, c_image, skips = nn.ModuleList(), skips[-1], 0, list(skips)
    for i in reversed(range(len(layers.widths))):
        stage = UpStage()
        for k in range(options["blocks"] + 1):
            joined = c + skips.pop()
            block = layers.block(c_in=joined, c_out=layers.widths[i])
            if layers.attends(i):
                block.norm1 = layers.attention_norm(joined)
            stage.blocks.append(block)
            c = layers.widths[i]
            here = layers.attends(i) and (options["attention_up"] == "all" or k == options["blocks"])
            stage.attention.append(layers.attention(c, layers.attention_norm) if here else nn.Identity())
        if options["progressive_output"] == "skip":
            taps = None if i == last else layers.fir or (1, 1)
            stage.pyramid = SkipOutput(layers.rank, c, options["out_channels"], layers.norm, taps)
        elif options["progressive_output"] == "residual":
            stage.pyramid = ResidualOutput(layers.rank, c_image, c, layers.norm, layers.fir, layers.rescale)
            c_image = c
        if i:
            stage.resample = layers.resample(c, up=True)
        stages.append(stage)
    return stages


class Head(nn.Module):
    """Norm, SiLU, convolution; zero at the start."""

    def __init__(self, rank: int, c_in: int, c_out: int, norm: Norm):
        super().__init__()
        self.norm = norm(c_in)
        self.conv = zero_(CONV[rank](c_in, c_out, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(h)))


class SkipInput(nn.Module):
    """The halved image, through a 1x1 convolution, added to the features or put beside them."""

    def __init__(self, rank: int, c_image: int, c: int, taps: Sequence[float] | None, combine: str):
        super().__init__()
        self.down, self.cat = Down(rank, taps or (1, 1)), combine == "cat"
        self.conv = xavier_(CONV[rank](c_image, c, 1))

    def forward(self, image: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        image = self.down(image)
        joined = self.conv(image)
        return image, torch.cat([joined, h], 1) if self.cat else joined + h


class ResidualInput(nn.Module):
    """A strided convolution of the image, to which the features are added; the sum is both from here on."""

    def __init__(self, rank: int, c_image: int, c: int, taps: Sequence[float] | None, rescale: bool):
        super().__init__()
        self.down, self.gain = ConvDown(rank, c_image, c, taps), 0.5**0.5 if rescale else 1.0

    def forward(self, image: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = (self.down(image) + h) * self.gain
        return h, h


class SkipOutput(nn.Module):
    """This resolution's contribution to the image, added to the doubled one of the coarser resolutions."""

    def __init__(self, rank: int, c: int, c_out: int, norm: Norm, taps: Sequence[float] | None):
        super().__init__()
        self.up = None if taps is None else Up(rank, taps)
        self.head = Head(rank, c, c_out, norm)

    def forward(self, image: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(h) if self.up is None else self.up(image) + self.head(h), h


class ResidualOutput(nn.Module):
    """A doubling convolution of the residual network's state, to which the features are added; the sum is both."""

    def __init__(self, rank: int, c_image: int, c: int, norm: Norm, taps: Sequence[float] | None, rescale: bool):
        super().__init__()
        self.up = ConvUp(rank, c_image, c, taps) if c_image else None
        self.head = nn.Identity() if c_image else Head(rank, c, c, norm)
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
