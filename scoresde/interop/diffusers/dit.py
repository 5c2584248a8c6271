"""The diffusion transformer of the diffusers library, `DiTTransformer2DModel`, as a `DiT`. Layer 4.

The networks are the same but for names and these points, all of which are followed, so that outputs are equal:

- the noise features are cosines before sines, at $10000^{-j/127}$; the code that the published weights were trained
  with has $10000^{-j/128}$;
- the layer norm before each MLP has `norm_eps`, 1e-5 by default, where that code has 1e-6;
- each block holds an embedding of its own, even where, as in published files, all are equal. Then one is kept.

Of an output that holds noise and variance the noise is kept. Labels are training steps, 0 to 999.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scoresde.interop.files import Weights
from scoresde.nets.dit import DiT

DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
# options with one value that means a DiT; the second half exists in older files, whose class had more uses
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_type": "default",
    "caption_channels": None,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "interpolation_scale": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_additional_conditions": None,
    "use_linear_projection": False,
}
# what the network does not use, and what only matters in half precision
UNUSED = {"norm_num_groups", "upcast_attention"}
FREQUENCIES = 128
DROPPED = 0.1  # share of labels that the original loses in training

Names = Iterator[tuple[str, Tensor]]


def dit_from_config(config: Mapping[str, Any], own_embeddings: bool) -> DiT:
    """The network that a `config.json` describes, with new weights.

    `own_embeddings`: each block keeps a noise embedding of its own, see `blocks_differ`. Raises `ValueError` for
    options that are not supported.
    """
    for key, value in FIXED.items():
        got = config.get(key, value)
        if got != value and (got or value):  # false, null and absent are the same
            raise ValueError(f"a diffusers DiT with {key}={got!r} is not supported; only {value!r} is.")
    known = DEFAULTS.keys() | FIXED.keys() | UNUSED
    unknown = sorted(k for k, v in config.items() if k not in known and not k.startswith("_") and v)
    if unknown:
        raise ValueError(f"options of a diffusers DiT that are not known here: {', '.join(unknown)}.")
    options = DEFAULTS | {k: v for k, v in config.items() if k in DEFAULTS}
    for key in DEFAULTS.keys() - {"out_channels", "dropout", "norm_eps"}:
        if not isinstance(options[key], int) or options[key] < 1:
            raise ValueError(f"a diffusers DiT needs a positive whole number for {key}, got {options[key]!r}.")
    channels, out = options["in_channels"], options["out_channels"]
    if out not in (None, channels, 2 * channels):
        raise ValueError(
            f"a diffusers DiT with in_channels={channels} should have out_channels={channels}, or {2 * channels} with "
            f"a learned variance; got {out}."
        )
    return DiT(
        channels,
        channels,
        (options["sample_size"],) * 2,
        patch=options["patch_size"],
        width=options["num_attention_heads"] * options["attention_head_dim"],
        depth=options["num_layers"],
        heads=options["num_attention_heads"],
        frequencies=FREQUENCIES,
        classes=options["num_embeds_ada_norm"],
        drop_cond=DROPPED,
        shared_embedding=not own_embeddings,
        dropout=float(options["dropout"]),
        mlp_eps=float(options["norm_eps"]),
    )


def blocks_differ(weights: Weights) -> bool:
    """Whether the blocks' noise embeddings have different weights, so that each has to be kept."""
    first = {k: v for k, v in weights.left.items() if k.startswith("transformer_blocks.0.norm1.emb.")}
    for name, value in weights.left.items():
        mine = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name)
        if mine in first and not torch.equal(first[mine], value):
            return True
    return False


def dit_weights(net: DiT, weights: Weights) -> dict[str, Tensor]:
    """The tensors of `net`, by its own names, taken from `weights`; to be given to `Weights.fill`.

    Raises `ValueError` where `net` shares one embedding and those in `weights` differ.
    """
    if net.config["shared_embedding"] and blocks_differ(weights):
        raise ValueError(
            f"the blocks in {weights.source} have different noise embeddings: build the network with "
            "own_embeddings=True."
        )
    return dict(_renamed(net, weights))


def _renamed(net: DiT, weights: Weights) -> Names:
    def layer(own: str, theirs: str) -> Names:
        for kind in ("weight", "bias"):
            yield f"{own}.{kind}", weights.take(f"{theirs}.{kind}")

    weights.ignore(["pos_embed.pos_embed"])  # fixed; only the first files hold it
    yield from layer("enter", "pos_embed.proj")
    for i in range(len(net.blocks)):
        own, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        embedding = dict(_embedding("embed" if net.config["shared_embedding"] else f"embed.{i}", theirs, weights))
        if i == 0 or not net.config["shared_embedding"]:
            yield from embedding.items()
        yield from layer(f"{own}.modulate", f"{theirs}.norm1.linear")
        for kind in ("weight", "bias"):
            yield f"{own}.qkv.{kind}", torch.cat([weights.take(f"{theirs}.attn1.to_{u}.{kind}") for u in "qkv"])
        yield from layer(f"{own}.out", f"{theirs}.attn1.to_out.0")
        yield from layer(f"{own}.first", f"{theirs}.ff.net.0.proj")
        yield from layer(f"{own}.second", f"{theirs}.ff.net.2")
    yield from layer("modulate", "proj_out_1")
    pixels, channels = math.prod(net.patch), net.config["out_channels"]
    for name, value in layer("leave", "proj_out_2"):
        if len(value) == 2 * pixels * channels:  # the second half of each pixel's channels is the variance
            value = value.reshape(pixels, 2 * channels, *value.shape[1:])[:, :channels].flatten(0, 1)
        yield name, value


def _embedding(own: str, block: str, weights: Weights) -> Names:
    theirs = f"{block}.norm1.emb"
    exponent = -math.log(10000) * torch.arange(FREQUENCIES, dtype=torch.float32)  # rounded where they round
    yield f"{own}.frequencies", torch.exp(exponent / (FREQUENCIES - 1))
    first = weights.take(f"{theirs}.timestep_embedder.linear_1.weight")
    yield f"{own}.first.weight", first.roll(FREQUENCIES, 1) if first.dim() == 2 else first
    yield f"{own}.first.bias", weights.take(f"{theirs}.timestep_embedder.linear_1.bias")
    for kind in ("weight", "bias"):
        yield f"{own}.second.{kind}", weights.take(f"{theirs}.timestep_embedder.linear_2.{kind}")
    yield f"{own}.classes.weight", weights.take(f"{theirs}.class_embedder.embedding_table.weight")
