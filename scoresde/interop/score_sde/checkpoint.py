"""Checkpoints of score_sde_pytorch (Song et al. 2021): DDPM, DDPM++, NCSN++ and NCSN under VP, sub-VP and VE. Layer 4.

Their files hold the weights in order of construction, `module.all_modules.{i}`, and no options; those come from the
configuration. What the originals do around the network is said here by a `ScoreNet`:

| SDE | data | label | the score is |
|---|---|---|---|
| VP, sub-VP, continuous | [-1, 1] | 999 t | -output / sigma |
| VP, discrete | [-1, 1] | (N - 1) t | -output / sigma, sigma of the discrete schedule |
| VE, continuous | [0, 1] | ln sigma, Fourier features | output / sigma |
| VE, discrete | [0, 1] | (N - 1)(1 - t) | output / sigma |

Discrete networks are given labels between their steps too; the originals round t to a step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from scoresde.interop.files import Weights, fitting, read_config, read_torch, step_count
from scoresde.interop.score_sde.ncsn import NCSN_MODELS, build_ncsn, ncsn_weights
from scoresde.interop.score_sde.published import PUBLISHED
from scoresde.interop.strangers import stranger
from scoresde.models.network import NoiseLabel, ScoreNet
from scoresde.nets.refinenet import RefineNet
from scoresde.nets.unet import UNet
from scoresde.sde import SDE, VESDE, VPSDE, DiscreteVPSDE, SubVPSDE
from scoresde.store import as_path

Names = Iterator[tuple[str, Tensor]]


def load_score_sde(
    path: str | os.PathLike[str], config: Any = None, *, ema: bool = True, state: Any = None
) -> ScoreNet:
    """The model of a `checkpoint_N.pth`, or of a folder with one (the newest of several).

    `config` are the options of the original's configuration: a dict (nested as theirs), a JSON or YAML file, or the name of
    a published one such as "vp/cifar10_ddpmpp_continuous"; without it, `config.json` beside the checkpoint. `ema` takes the
    averaged parameters, which are the ones the papers report. `state` is what the file
    holds, if it has been read already. The network is in evaluation mode, on the CPU.

    Raises `FileNotFoundError`, and `ValueError` for damaged files, files with code, options that are not supported and weights
    that do not fit them.
    """
    file = checkpoint_file(path)
    state = read_torch(file) if state is None else state
    if not is_checkpoint(state):  # said before the options are asked for, which it would not help to give
        raise stranger(file, state)
    if config is None:
        beside = file.parent / "config.json"
        if not beside.is_file():
            raise ValueError(
                f"{file} does not carry its options; give config=: the original's as a dict or a JSON file, or one of "
                f"{', '.join(PUBLISHED)}."
            )
        config = beside
    options = read_config(config, PUBLISHED)
    with fitting(str(file)):
        tensors = _parameters(state, ema, str(file))
        weights = Weights({k.removeprefix("module."): v for k, v in tensors.items()}, str(file))
        weights.check()
        model = build_score_sde(options, weights)
        weights.ignore(["sigmas"])
        net = model.net
        if isinstance(net, RefineNet):
            values = ncsn_weights(net, weights)
        else:
            values = dict(_renamed(cast(UNet, net), weights))
        model.net = weights.fill(net, values)
    return model.eval()


def is_checkpoint(state: Any) -> bool:
    """Whether what a file holds is laid out as their trainer writes it, and has the names of their networks."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        return False
    names = [str(k).removeprefix("module.") for k in state["model"]]
    return any(n.startswith(("all_modules.", "begin_conv.")) for n in names)


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """The newest `checkpoint_N.pth` of a folder, or the file itself."""
    path = as_path(path)
    if not path.is_dir():
        return path
    found = sorted(path.glob("checkpoint*.pth"), key=lambda p: (len(p.name), p.name))
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint_N.pth.")
    return found[-1]


def build_score_sde(options: dict[str, Any], weights: Weights) -> ScoreNet:
    """A model from the original's options, its network a sketch for `Weights.fill`; the width is read off the weights.

    Raises `ValueError`.
    """
    if str(options.get("model", {}).get("name", "")).lower() in NCSN_MODELS:
        return build_ncsn(options, weights)
    try:
        training, data, net = options["training"], options["data"], options["model"]
        continuous, kind = _flag(training, "continuous"), str(training["sde"]).lower()
        sde, label, parameterization = _process(kind, continuous, net)
        channels, size = int(data.get("num_channels", 3)), int(data["image_size"])
        centred = _flag(data, "centered")
        if kind == "vesde" and not net.get("scale_by_sigma", True):
            parameterization = "score"
        elif kind != "vesde" and net.get("scale_by_sigma", False):
            raise ValueError("scale_by_sigma is supported for the VE SDE only.")
        with weights.sketch():
            made = UNet(
                channels, channels, (size, size), **_unet_options(net, size, weights), rescale_input=not centred
            )
    except KeyError as e:
        raise ValueError(f"the configuration lacks the option {e}; give the original's in full.") from e
    return ScoreNet(
        made,
        sde,
        parameterization,
        label=label,
        sigma_data=0.5 if centred else 0.25,
        event_shape=(channels, size, size),
        levels=256,
        value_range=(-1.0, 1.0) if centred else (0.0, 1.0),
    )


def _process(kind: str, continuous: bool, net: dict[str, Any]) -> tuple[SDE, NoiseLabel, str]:
    count = step_count(net.get("num_scales", 1000), "num_scales")
    fourier = net["name"] != "ddpm" and str(net.get("embedding_type", "positional")).lower() == "fourier"
    if kind == "vesde":
        sde = VESDE(float(net["sigma_min"]), float(net["sigma_max"]))
        if continuous != fourier:
            raise ValueError("VE checkpoints have Fourier embeddings if continuous and positional ones if discrete.")
        return (
            sde,
            NoiseLabel("log_sigma") if continuous else NoiseLabel("time", 1.0 - count, count - 1.0),
            "scaled_score",
        )
    if fourier:
        raise ValueError("Fourier embeddings are supported for the VE SDE only.")
    low, high = float(net["beta_min"]), float(net["beta_max"])
    if kind == "subvpsde":
        return SubVPSDE(low, high), NoiseLabel("time", 999.0), "noise"
    if kind == "vpsde":
        if continuous:
            return VPSDE(low, high), NoiseLabel("time", 999.0), "noise"
        return DiscreteVPSDE.linear(low / count, high / count, count), NoiseLabel("time", count - 1.0), "noise"
    raise ValueError(f"unknown SDE {kind!r} in training.sde; known are vpsde, subvpsde and vesde.")


def _unet_options(net: dict[str, Any], size: int, weights: Weights) -> dict[str, Any]:
    """`UNet`'s options from the original's `model` section."""
    name = str(net["name"]).lower()
    for option, wanted in (("normalization", "groupnorm"), ("nonlinearity", "swish"), ("attention_type", "ddpm")):
        if str(net.get(option, wanted)).lower() != wanted:
            raise ValueError(f"{option} {net[option]!r} is not supported; published U-Nets have {wanted}.")
    if not net.get("conditional", True) or not net.get("resamp_with_conv", True):
        raise ValueError("networks without noise labels or with bare resampling are not supported.")
    multipliers = tuple(int(m) for m in net["ch_mult"])
    lengths = [size // 2**i for i in range(len(multipliers))]
    options = dict(
        width=_width(weights, int(net["nf"])),
        multipliers=multipliers,
        blocks=int(net["num_res_blocks"]),
        attention=tuple(n for n in net["attn_resolutions"] if n in lengths),
        dropout=float(net.get("dropout", 0.0)),
    )
    if name == "ddpm":
        return options | dict(residual="ddpm", resample="conv", rescale_skips=False, group_channels=1)
    if name != "ncsnpp":
        raise ValueError(
            f"the network {name!r} is not supported; known are ddpm, ncsnpp (which DDPM++ is, too) and "
            f"{', '.join(NCSN_MODELS)}."
        )
    residual, fir = str(net["resblock_type"]).lower(), _flag(net, "fir")
    if residual == "ddpm" and fir:
        raise ValueError("resblock_type 'ddpm' with fir does not run in the original either.")
    if str(net["progressive"]).lower() == "residual":
        raise ValueError("progressive 'residual' does not run in the original.")
    kinds = {"none": "none", "input_skip": "skip", "output_skip": "skip", "residual": "residual"}
    for option in ("progressive", "progressive_input"):
        if str(net[option]).lower() not in kinds:
            raise ValueError(f"unknown {option} {net[option]!r}; use one of {', '.join(kinds)}.")
    return options | dict(
        residual=residual,
        resample="fir" if fir else "conv" if residual == "ddpm" else "mean",
        taps=tuple(net.get("fir_kernel", (1, 3, 3, 1))),
        rescale_skips=_flag(net, "skip_rescale"),
        progressive_output=kinds[str(net["progressive"]).lower()],
        progressive_input=kinds[str(net["progressive_input"]).lower()],
        progressive_combine=str(net.get("progressive_combine", "sum")).lower(),
        embedding=str(net["embedding_type"]).lower(),
        fourier_scale=float(net.get("fourier_scale", 16)),
    )


def _flag(options: dict[str, Any], name: str) -> bool:
    if options[name] not in (True, False):
        raise ValueError(f"{name} must be true or false, got {options[name]!r}.")
    return bool(options[name])


def _width(weights: Weights, nf: int) -> int:
    """Channels of the finest resolution: of the first convolution in the file."""
    first = next((v for v in weights.left.values() if v.dim() == 4), None)
    return nf if first is None else first.shape[0]


def _parameters(state: dict[str, Any], ema: bool, source: str) -> dict[str, Tensor]:
    """The model's tensors by name, the trainable ones replaced by their averages where asked for."""
    tensors = {k: v for k, v in state["model"].items() if isinstance(v, Tensor)}
    if not ema:
        return tensors
    shadow = (state.get("ema") or {}).get("shadow_params")
    if shadow is None:
        raise ValueError(
            f"{source} has no averaged parameters (ema.shadow_params); load it by load_score_sde(..., ema=False)."
        )
    # the list has the trainable parameters in their order: the table of sigmas and the Fourier frequencies are not among them
    names = [k for k, v in tensors.items() if not k.endswith("sigmas") and not (k.endswith(".0.W") and v.dim() == 1)]
    if len(names) != len(shadow) or any(tensors[k].shape != v.shape for k, v in zip(names, shadow, strict=False)):
        raise ValueError(
            f"the {len(shadow)} averaged parameters in {source} are not those of its {len(names)} trainable ones."
        )
    return tensors | dict(zip(names, shadow, strict=True))


def _renamed(net: UNet, weights: Weights) -> Names:
    """Our names with the file's tensors, walking the network in the order in which the original builds it."""
    place = 0

    def layer(own: str, *, of: str = "") -> Names:
        for kind in ("weight", "bias"):
            yield f"{own}.{kind}", weights.take(f"all_modules.{place}.{of}{kind}")

    def linear(own: str, number: int, *, conv: bool = False) -> Names:
        matrix = weights.take(f"all_modules.{place}.NIN_{number}.W").t()
        yield f"{own}.weight", matrix[..., None, None] if conv and matrix.numel() else matrix
        yield f"{own}.bias", weights.take(f"all_modules.{place}.NIN_{number}.b")

    def residual(own: str, block: Any) -> Names:
        parts = (("norm1", "GroupNorm_0."), ("conv1", "Conv_0."), ("modulate", "Dense_0."))
        for ours, theirs in (*parts, ("norm2", "GroupNorm_1."), ("conv2", "Conv_1.")):
            yield from layer(f"{own}.{ours}", of=theirs)
        if not isinstance(block.skip, torch.nn.Identity):
            if f"all_modules.{place}.NIN_0.W" in weights:
                yield from linear(f"{own}.skip", 0, conv=True)
            else:
                yield from layer(f"{own}.skip", of="Conv_2.")

    def attention(own: str) -> Names:
        yield from layer(f"{own}.norm", of="GroupNorm_0.")
        parts = [dict(linear("", i)) for i in range(3)]
        if not weights.missing:
            for kind in ("weight", "bias"):
                yield f"{own}.qkv.{kind}", torch.cat([p[f".{kind}"] for p in parts])
        yield from linear(f"{own}.out", 3)

    def head(own: str) -> Names:
        nonlocal place
        yield from layer(f"{own}.norm")
        place += 1
        yield from layer(f"{own}.conv")
        place += 1

    if net.embed.turn != 1.0:
        yield "embed.frequencies", weights.take(f"all_modules.{place}.W")
        place += 1
    else:
        yield "embed.frequencies", net.embed.frequencies
    for own in ("embed.first", "embed.second", "enter"):
        yield from layer(own)
        place += 1
    for way in ("down", "middle", "up"):
        if way == "middle":
            for i in range(3):
                yield from attention("middle.1") if i == 1 else residual(f"middle.{i}", net.middle[i])
                place += 1
            continue
        for i, stage in enumerate(getattr(net, way)):
            for k, block in enumerate(stage.blocks):
                yield from residual(f"{way}.{i}.blocks.{k}", block)
                place += 1
                if not isinstance(stage.attention[k], torch.nn.Identity):
                    yield from attention(f"{way}.{i}.attention.{k}")
                    place += 1
            own = f"{way}.{i}"
            if way == "up" and stage.pyramid is not None:
                if getattr(stage.pyramid, "head", None) is not None:
                    yield from head(f"{own}.pyramid.head")
                else:
                    yield from layer(f"{own}.pyramid.up.conv", of="Conv_0.")
                    place += 1
            if stage.resample is not None:
                if hasattr(stage.resample, "norm1"):
                    yield from residual(f"{own}.resample", stage.resample)
                else:
                    yield from layer(f"{own}.resample.conv", of="Conv_0.")
                place += 1
            if way == "down" and stage.pyramid is not None:
                if hasattr(stage.pyramid, "conv"):
                    yield from layer(f"{own}.pyramid.conv", of="Conv_0.")
                else:  # called otherwise where it has a filter
                    fir = stage.pyramid.down.filter is not None
                    yield from layer(f"{own}.pyramid.down.conv", of="Conv2d_0." if fir else "Conv_0.")
                place += 1
    if net.leave is not None:
        yield from head("leave")
