"""The U-Net of the field, with the options of DDPM, DDPM++, NCSN++ and ADM, for 1, 2 or 3 spatial axes. Layer 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from scoresde.nets.blocks import CONV, check_input, xavier_
from scoresde.nets.conditioning import ConditionalEmbedding, Conditions
from scoresde.nets.options import LIMITS, arguments, choices
from scoresde.nets.resample import check_padding, crop, pad_to_multiple
from scoresde.nets.unet_parts import Head, Layers, decoder, encoder, middle

CHOICES = {
    "residual": ("biggan", "ddpm"),
    "resample": ("mean", "fir", "conv", "conv_centred"),
    "modulation": ("shift", "scale_shift"),
    "attention_up": ("last", "all"),
    "progressive_input": ("none", "skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "progressive_output": ("none", "skip", "residual"),
}
MOST_BLOCKS = 512  # a mistake, or a file that means harm: published networks have up to 32


class UNet(nn.Module):
    """Residual blocks down and up again, with a skip connection for each block: `forward(x, label, cond=None)`.

    x (B, in_channels, *size), label (B,) -> (B, out_channels, *size); the output layer starts at zero. `cond` as in
    `Conditions`. Sizes other than `size` work too, if their axes can be halved as often or `pad` is set.

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
        classes, cond_dim, numbers, tokens, pooled, spatial: the conditions that the network takes (`cond_dim` is the number of
            features), with `drop_cond` and `null_class` see `Conditions`, with `join` see `ConditionalEmbedding`.
        group_channels, max_groups, eps: group norms have min(max_groups, channels // group_channels) groups. Where
            `attention_groups` is given, this many have, at the resolutions with attention, the attention's norms and on the way up
            the first norms of the blocks (as diffusers counts them in NCSN++; the same from 128 channels on).
        dropout: probability, in every residual block.
        rescale_input: the data lie in [0, 1] and the network sees 2 x - 1, as NCSN++ does.
        pad: surround x (and the spatial condition) by zeros up to the next size that can be halved, and crop the result, so
            that 28x28 or 27x27 go through four resolutions as 32x32; `attention` refers to the padded size. The network is
            still a map of x's own shape, whose likelihood is as exact as any other's.

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
        numbers: int = 0,
        tokens: int = 0,
        pooled: int = 0,
        spatial: int = 0,
        drop_cond: float | Mapping[str, float] = 0.0,
        join: str = "hidden",
        null_class: bool = True,
        group_channels: int = 4,
        max_groups: int = 32,
        attention_groups: int | None = None,
        eps: float = 1e-6,
        dropout: float = 0.0,
        rescale_input: bool = False,
        pad: bool = False,
    ):
        given = arguments(locals())
        super().__init__()
        self.config = given
        lengths = _check(given)
        rank = len(given["size"])
        self.rank, self.rescale_input, self.pad = rank, rescale_input, pad
        self.factor = 2 ** (len(given["multipliers"]) - 1)
        self.conditions = Conditions.of(given)

        if frequencies is None:
            frequencies = width if embedding == "fourier" else max(width // 2, 1)
        embedding_width = 4 * width if embedding_width is None else embedding_width
        self.embed = ConditionalEmbedding(
            embedding_width, self.conditions, frequencies, kind=embedding, scale=fourier_scale, join=join
        )
        layers = Layers(given, lengths, in_channels + spatial, embedding_width)
        self.enter = xavier_(CONV[rank](in_channels + spatial, width, 3, padding=1))
        self.down, skips = encoder(layers)
        self.middle = middle(layers, skips[-1])
        self.up = decoder(layers, skips)
        self.leave = None if progressive_output == "skip" else Head(rank, layers.widths[0], out_channels, layers.norm)

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        check_input(x, label, self.rank, self.config["in_channels"])
        size = tuple(x.shape[2:])
        if not self.pad and any(n % self.factor for n in size):
            raise ValueError(
                f"this network halves its input {self.factor.bit_length() - 1} times: every spatial axis must be a "
                f"multiple of {self.factor}, got {size}; a network built with pad=True takes any size."
            )
        parts = self.conditions.read(cond, x, self.training)
        embedding = self.embed(label, parts)
        x = parts.beside(2 * x - 1 if self.rescale_input else x)
        if self.pad:
            x = pad_to_multiple(x, (self.factor,) * self.rank)
        h = self.enter(x)
        image, skips = x, [h]
        for stage in self.down:
            image, h = stage(image, h, embedding, skips)
        first, attention, second = self.middle
        h = second(attention(first(h, embedding)), embedding)
        result: Any = None  # of the progressive output
        for stage in self.up:
            result, h = stage(result, h, embedding, skips)
        return crop(result if self.leave is None else self.leave(h), size)


def _check(given: dict[str, Any]) -> list[int]:
    """Lengths of the last axis at each resolution; `ValueError` for options that do not fit each other."""
    size, multipliers, attention = given["size"], given["multipliers"], given["attention"]
    halvings = len(multipliers) - 1
    if len(size) not in CONV:
        raise ValueError(f"size must have 1, 2 or 3 spatial axes, got {size}.")
    if not multipliers:
        raise ValueError("multipliers must have one entry per resolution, got none.")
    if len(multipliers) * given["blocks"] > MOST_BLOCKS:
        raise ValueError(
            f"a U-Net has at most {MOST_BLOCKS} blocks on its way down, got {len(multipliers)} * {given['blocks']}."
        )
    if any(not 1 <= round(given["width"] * m) <= LIMITS["width"][1] for m in multipliers):
        raise ValueError(
            f"multipliers {multipliers} of width {given['width']} must each give a channel at least, and at most "
            f"{LIMITS['width'][1]}."
        )
    if not given["pad"] and any(n % 2**halvings for n in size):
        raise ValueError(
            f"size {size} cannot be halved {halvings} times; use fewer multipliers, or pad=True to pad inside the network."
        )
    check_padding(size, halvings)
    coarsest = -(-size[-1] // 2**halvings)  # rounded up: of the padded size
    lengths = [coarsest * 2 ** (halvings - i) for i in range(halvings + 1)]
    absent = [n for n in attention if n not in lengths]
    if absent:
        raise ValueError(f"attention={attention}: the resolutions of this network are {lengths}, not {absent}.")
    choices(given, **CHOICES)
    if given["residual"] == "biggan" and given["resample"] not in ("mean", "fir"):
        raise ValueError("residual='biggan' resamples by 'mean' or 'fir'; a strided convolution needs residual='ddpm'.")
    if given["progressive_output"] == "residual" and given["resample"] not in ("fir", "conv", "mean"):
        raise ValueError("progressive_output='residual' needs resample 'fir', 'mean' or 'conv'.")
    return lengths
