"""The U-Net of the diffusers library, `UNet2DModel`, with skip blocks too (NCSN++), as a `UNet`. Layer 4."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.interop.files import Weights
from scoresde.nets.unet import UNet

Names = Iterator[tuple[str, Tensor]]
WHOLE = (
    "in_channels",
    "out_channels",
    "layers_per_block",
    "attention_head_dim",
    "norm_num_groups",
    "attn_norm_num_groups",
    "time_embedding_dim",
    "num_class_embeds",
)

_KINDS = {
    "DownBlock2D": (False, False),
    "ResnetDownsampleBlock2D": (False, False),
    "AttnDownBlock2D": (True, False),
    "SkipDownBlock2D": (False, True),
    "AttnSkipDownBlock2D": (True, True),
    "UpBlock2D": (False, False),
    "ResnetUpsampleBlock2D": (False, False),
    "AttnUpBlock2D": (True, False),
    "SkipUpBlock2D": (False, True),
    "AttnSkipUpBlock2D": (True, True),
}


def unet_from_config(config: Mapping[str, Any], weights: Weights) -> UNet:
    """An untrained `UNet` of the structure of a `UNet2DModel` with these options. Raises `ValueError` for unsupported ones."""
    get = {**_DEFAULTS, **{k: v for k, v in config.items() if not k.startswith("_")}}.__getitem__
    down, up = list(get("down_block_types")), list(get("up_block_types"))[::-1]
    foreign = [k for k in config if k not in _DEFAULTS and k != "num_train_timesteps" and not k.startswith("_")]
    if foreign:
        raise ValueError(f"options {', '.join(foreign)} of UNet2DModel are not known here, so they cannot be left out.")
    unknown = [k for k in down + up if k not in _KINDS]
    if unknown:
        raise ValueError(f"blocks {', '.join(sorted(set(unknown)))} are not supported; known are {', '.join(_KINDS)}.")
    kinds = [_KINDS[k] for k in down]
    if kinds != [_KINDS[k] for k in up] or len({skip for _, skip in kinds}) != 1:
        raise ValueError(f"down_block_types {down} and up_block_types {up[::-1]} must mirror each other.")
    skip = kinds[0][1]
    widths, attention_dim = [int(w) for w in get("block_out_channels")], get("attention_head_dim")
    size = get("sample_size") or 2 ** (len(widths) + 2)
    size = (size, size) if isinstance(size, int) else tuple(size)
    scale = get("resnet_time_scale_shift")
    _refuse(get, skip, scale)
    ways = _resampling(down[:-1], get("downsample_type")) | _resampling(up[1:], get("upsample_type"))
    if len(ways) > 1:
        raise ValueError(
            f"blocks {down} and {up[::-1]} change the resolution in different ways, which is not supported."
        )
    resnet = ways == {"resnet"}
    groups = get("norm_num_groups")
    conv = "conv" if int(get("downsample_padding")) == 0 else "conv_centred"
    fourier = get("time_embedding_type") == "fourier"
    return UNet(
        int(get("in_channels")),
        int(get("in_channels")),
        size,
        width=widths[0],
        multipliers=[w / widths[0] for w in widths],
        blocks=int(get("layers_per_block")),
        attention=[size[-1] // 2**i for i, (has, _) in enumerate(kinds) if has],
        attention_up="last" if skip else "all",
        middle_attention=bool(get("add_attention")),
        head_channels=attention_dim,
        residual="biggan" if skip or resnet else "ddpm",
        resample="fir" if skip else "mean" if resnet else conv,
        project_resampled=skip,
        modulation="scale_shift" if scale == "scale_shift" else "shift",
        rescale_skips=skip,
        progressive_input="skip" if skip else "none",
        progressive_output="skip" if skip else "none",
        embedding="fourier" if fourier else "positional",
        frequencies=widths[0] if fourier else widths[0] // 2,
        embedding_width=get("time_embedding_dim") or 4 * widths[0],
        classes=int(get("num_class_embeds") or 0),
        join="output",
        null_class=False,
        group_channels=1 if groups else 4,
        max_groups=int(groups or 32),
        attention_groups=32 if skip else None,
        eps=float(get("norm_eps")),
        dropout=float(get("dropout")),
        rescale_input=bool(get("center_input_sample")),
    )


_DEFAULTS: dict[str, Any] = dict(
    sample_size=None,
    in_channels=3,
    out_channels=3,
    center_input_sample=False,
    time_embedding_type="positional",
    time_embedding_dim=None,
    freq_shift=0,
    flip_sin_to_cos=True,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(224, 448, 672, 896),
    layers_per_block=2,
    mid_block_scale_factor=1,
    downsample_padding=1,
    downsample_type="conv",
    upsample_type="conv",
    dropout=0.0,
    act_fn="silu",
    attention_head_dim=8,
    norm_num_groups=32,
    attn_norm_num_groups=None,
    norm_eps=1e-5,
    resnet_time_scale_shift="default",
    add_attention=True,
    class_embed_type=None,
    num_class_embeds=None,
)


def _resampling(blocks: list[str], attention_type: str) -> set[str]:
    """How these blocks change the resolution: "conv", "resnet", or both."""
    by_block = {"Attn": attention_type, "Resnet": "resnet"}
    return {next((v for k, v in by_block.items() if b.startswith(k)), "conv") for b in blocks}


def _refuse(get: Any, skip: bool, scale: str) -> None:
    """`ValueError` for options that our `UNet` has no counterpart of."""
    for name in WHOLE:
        if get(name) is not None and (type(get(name)) is not int or get(name) < 1):
            raise ValueError(f"{name} of a UNet2DModel must be a whole number of at least 1, got {get(name)!r}.")
    mid = get("mid_block_scale_factor")
    checks = (
        ("act_fn", get("act_fn") in ("silu", "swish")),
        ("time_embedding_type", get("time_embedding_type") in ("positional", "fourier")),
        ("mid_block_type", get("mid_block_type") == "UNetMidBlock2D"),
        ("resnet_time_scale_shift", scale in ("default", "scale_shift")),
        ("class_embed_type", get("class_embed_type") is None),
        (
            "upsample_type",
            get("upsample_type") == get("downsample_type") and get("upsample_type") in ("conv", "resnet"),
        ),
        ("out_channels", get("out_channels") in (get("in_channels"), 2 * get("in_channels"))),
        ("mid_block_scale_factor", math.isclose(mid, math.sqrt(2) if skip else 1.0, rel_tol=1e-6)),
        ("add_attention", get("add_attention") in (True, False)),
        # without these the attention of the middle has no norm, or another one
        ("attn_norm_num_groups", _middle_norm(get, scale)),
    )
    for name, supported in checks:
        if not supported:
            raise ValueError(
                f"UNet2DModel with {name}={get(name)!r} is not supported here (with its other options as given)."
            )


def _middle_norm(get: Any, scale: str) -> bool:
    groups = get("attn_norm_num_groups")
    if not get("add_attention"):
        return True
    if groups is None:
        return scale == "default"
    return groups == get("norm_num_groups")


def unet_weights(net: UNet, config: Mapping[str, Any], weights: Weights) -> Names:
    """Our names with the file's tensors, which are used up."""
    options = {**_DEFAULTS, **config}

    def layer(own: str, theirs: str) -> Names:
        for kind in ("weight", "bias"):
            yield f"{own}.{kind}", weights.take(f"{theirs}.{kind}")

    def residual(own: str, theirs: str, block: Any) -> Names:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            yield from layer(f"{own}.{name}", f"{theirs}.{name}")
        yield from layer(f"{own}.modulate", f"{theirs}.time_emb_proj")
        if not isinstance(block.skip, nn.Identity):
            yield from layer(f"{own}.skip", f"{theirs}.conv_shortcut")

    def attention(own: str, theirs: str) -> Names:
        yield from layer(f"{own}.norm", f"{theirs}.group_norm")
        for kind in ("weight", "bias"):  # by the names of today and of the first files
            parts = [
                weights.take(f"{theirs}.{new}.{kind}", f"{theirs}.{old}.{kind}")
                for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"))
            ]
            yield f"{own}.qkv.{kind}", torch.cat([v.flatten(1) if v.dim() > 2 else v for v in parts])
            yield f"{own}.out.{kind}", weights.take(f"{theirs}.to_out.0.{kind}", f"{theirs}.proj_attn.{kind}")

    yield from _embedding(net, options, weights)
    yield from layer("enter", "conv_in")
    for way in ("down", "up"):
        for i, stage in enumerate(getattr(net, way)):
            own, theirs, placed = f"{way}.{i}", f"{way}_blocks.{i}", 0
            for k, block in enumerate(stage.blocks):
                yield from residual(f"{own}.blocks.{k}", f"{theirs}.resnets.{k}", block)
                if not isinstance(stage.attention[k], nn.Identity):
                    yield from attention(f"{own}.attention.{k}", f"{theirs}.attentions.{placed}")
                    placed += 1
            if stage.resample is not None:
                if not hasattr(stage.resample, "norm1"):
                    yield from layer(f"{own}.resample.conv", f"{theirs}.{way}samplers.0.conv")
                elif stage.pyramid is not None:
                    yield from residual(f"{own}.resample", f"{theirs}.resnet_{way}", stage.resample)
                else:
                    yield from residual(f"{own}.resample", f"{theirs}.{way}samplers.0", stage.resample)
            if stage.pyramid is not None and way == "down":
                yield from layer(f"{own}.pyramid.conv", f"{theirs}.skip_conv")
            elif stage.pyramid is not None:
                last = i == len(net.up) - 1  # whose contribution is the end of the network
                yield from layer(f"{own}.pyramid.head.norm", "conv_norm_out" if last else f"{theirs}.skip_norm")
                yield from layer(f"{own}.pyramid.head.conv", "conv_out" if last else f"{theirs}.skip_conv")
    for own, part in (("middle.0", 0), ("middle.2", 1)):
        yield from residual(own, f"mid_block.resnets.{part}", net.middle[2 * part])
    if not isinstance(net.middle[1], nn.Identity):
        yield from attention("middle.1", "mid_block.attentions.0")
    if net.leave is not None:
        yield from layer("leave.norm", "conv_norm_out")
        for kind in ("weight", "bias"):
            yield f"leave.conv.{kind}", weights.take(f"conv_out.{kind}")[: net.config["out_channels"]]


def _embedding(net: UNet, options: Mapping[str, Any], weights: Weights) -> Names:
    half = net.embed.frequencies.numel()
    first = weights.take("time_embedding.linear_1.weight")
    if options["time_embedding_type"] == "fourier":
        yield "embed.frequencies", weights.take("time_proj.weight", "time_proj.W")
        weights.ignore(["time_proj.W"])
    else:
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - options["freq_shift"])
        yield "embed.frequencies", torch.exp(exponent)
        if options["flip_sin_to_cos"] and first.numel():
            first = first.roll(half, 1)
    if net.embed.classes is not None:
        table = weights.take("class_embedding.weight")
        yield "embed.classes.weight", torch.cat([table, torch.zeros_like(table[:1])]) if table.numel() else table
    yield "embed.first.weight", first
    yield "embed.first.bias", weights.take("time_embedding.linear_1.bias")
    for kind in ("weight", "bias"):
        yield f"embed.second.{kind}", weights.take(f"time_embedding.linear_2.{kind}")
