r"""Checkpoints of EDM (Karras et al. 2022): their U-Nets under the EDM, VP, VE and iDDPM preconditionings. Layer 4.

Nearly all is read off the weights: names say which architecture and which resolutions have attention, shapes the widths,
stored filters the resampling. Only the preconditioning is not; it comes from a snapshot's class name, from `config`, or is
EDM's own. In our terms:

| class | SDE | parameterization | label |
|---|---|---|---|
| EDMPrecond | EDMSDE(0.002, 80) | edm, sigma_data 0.5 | ln(sigma) / 4 |
| VPPrecond | VPSDE | noise | 999 t |
| VEPrecond | VESDE(0.02, 100) | scaled_score | ln(sigma / 2) |
| iDDPMPrecond | DiscreteVPSDE of its table | noise | (N - 1) t |

Class labels are added to the noise features before (DDPM++, NCSN++) or after (ADM) two linear layers; the first case is
folded into the hidden layer, where it is the same. Augmentation labels count as zeros, as they do when sampling.
"""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from scoresde.interop.edm.snapshot import network_of
from scoresde.interop.files import Weights, fitting, read_config, read_torch
from scoresde.models.network import NoiseLabel, ScoreNet
from scoresde.nets.blocks import SelfAttention
from scoresde.nets.unet import UNet
from scoresde.sde import EDMSDE, SDE, VESDE, VPSDE, DiscreteVPSDE
from scoresde.store import as_path, read_tensors

PRECONDITIONINGS = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond", "iddpm": "iDDPMPrecond"}
ARCHITECTURES = {
    "ddpmpp": {"model_type": "SongUNet", "embedding_type": "positional"},
    "ncsnpp": {"model_type": "SongUNet", "embedding_type": "fourier"},
    "adm": {"model_type": "DhariwalUNet"},
}
# constructor arguments that do not change what the network computes at evaluation, or that the weights show
_SEEN = """
    img_resolution img_channels label_dim augment_dim model_channels channel_mult channel_mult_emb
    num_blocks attn_resolutions dropout label_dropout channel_mult_noise encoder_type decoder_type
    resample_filter use_fp16 sigma_min sigma_max class_name name init_args M C_1 C_2
"""

Names = Iterator[tuple[str, Tensor]]


STATE_FILES = ("state.pt", "model.pt")


def load_edm(path: str | os.PathLike[str], config: Any = None, *, state: Any = None) -> ScoreNet:
    """The model of an EDM network: a state dict saved by `torch.save`, a safetensors file, or a snapshot `.pkl`.

    A snapshot is read without executing it, see `scoresde.interop.edm.snapshot`. `config` may give the original's constructor
    arguments (dict, JSON or YAML file), or a name ("edm", "vp", "ve", "iddpm", "ncsnpp", ...): it decides the preconditioning and
    `sigma_data`, and is checked against the weights. Class-conditional networks take `cond` of class labels (B,) or one-hot rows
    (B, classes); without it, no class. `state` is what the file holds, if it has been read already.

    Raises `FileNotFoundError`, and `ValueError` for damaged files, files with code, other networks (EDM2 among them) and
    options that contradict the weights.
    """
    file, tensors, options = _read(as_path(path), state)
    if config is not None:
        options |= _named(config) if _is_name(config) else _flat(read_config(config))
    with fitting(str(file)):
        return _model_of(Weights({str(k).removeprefix("model."): v for k, v in tensors.items()}, str(file)), options)


def _model_of(weights: Weights, options: dict[str, Any]) -> ScoreNet:
    weights.check()
    weights.ignore([k for k in weights.left if k.endswith("resample_filter") and "_aux_" in k and "residual" not in k])
    options = _by_architecture(options)
    plan = _Plan(weights, options)
    model = _model(plan, weights, options)
    weights.ignore([k for k in weights.left if k.endswith("resample_filter") or k == "map_augment.weight" or k == "u"])
    model.net = weights.fill(model.net, dict(_renamed(cast(UNet, model.net), plan, weights)))
    return model.eval()


def is_state(state: Any) -> bool:
    """Whether what a file holds has the names of an EDM network, at most one level down."""
    parts = [state, *state.values()] if isinstance(state, dict) else []
    return any(isinstance(p, dict) and any(str(k).endswith("map_layer0.weight") for k in p) for p in parts)


def _read(path: Path, state: Any = None) -> tuple[Path, Mapping[str, Tensor], dict[str, Any]]:
    """(file, tensors, constructor arguments as far as the file has them or stand beside it in config.json)."""
    options: dict[str, Any] = {}
    if path.is_dir():
        found = [path / name for name in STATE_FILES if (path / name).is_file()] or sorted(path.glob("*.pkl"))
        if not found:
            raise FileNotFoundError(f"{path} holds no {' or '.join(STATE_FILES)} and no .pkl snapshot.")
        path = found[-1]
    if (path.parent / "config.json").is_file():
        options = _flat(read_config(path.parent / "config.json"))
    if path.suffix == ".pkl" and state is None and not zipfile.is_zipfile(path):
        record = network_of(path)
        return path, record.state_dict(), options | {"precond": record.class_name} | _flat(dict(record.init_kwargs))
    if path.suffix == ".safetensors":
        return path, read_tensors(path, foreign=True)[0], options
    state = read_torch(path) if state is None else state
    for key in ("ema", "net", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is no state dict of an EDM network: it should map names to tensors.")
    return path, state, options


def _is_name(config: Any) -> bool:
    return isinstance(config, str) and Path(config).suffix not in (".json", ".yaml", ".yml")


def _named(name: str) -> dict[str, Any]:
    """Options that a name such as "edm", "vp", "ncsnpp" or "edm-cifar10-32x32-uncond-vp" stands for."""
    # beside these, the names of their snapshots say what the data were
    about = "baseline cifar imagenet ffhq afhqv x cond uncond pkl"
    words = [w for w in re.split(r"[^a-z]+", name.lower().replace("++", "pp")) if w]
    preconds = [w for w in words if w in PRECONDITIONINGS]
    if "edm" in preconds:  # in the names of their snapshots vp and ve then stand for ddpmpp and ncsnpp
        words = [{"vp": "ddpmpp", "ve": "ncsnpp"}.get(w, w) if w != "edm" else w for w in words]
        preconds = ["edm"]
    found: dict[str, Any] = {"precond": preconds[0]} if preconds else {}
    for word in words:
        found |= ARCHITECTURES.get(word, {})
    if not found or any(w not in {*PRECONDITIONINGS, *ARCHITECTURES, *about.split()} for w in words):
        known = ", ".join((*PRECONDITIONINGS, *ARCHITECTURES))
        raise ValueError(
            f"{name!r} is no configuration of EDM; give its options, a .json or .yaml file, or a name of {known}."
        )
    return found


def _by_architecture(options: dict[str, Any]) -> dict[str, Any]:
    """Options in which the architecture's name, ncsnpp or the like, is replaced by what it stands for."""
    for key in ("model_type", "arch", "name"):
        if str(options.get(key)) in ARCHITECTURES:
            options = {k: v for k, v in options.items() if k != key} | ARCHITECTURES[options[key]]
    return options


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of nested dicts, whatever these are called, beside them."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return flat


class _Plan:
    """What the names and shapes of the weights say about the network."""

    def __init__(self, weights: Weights, options: dict[str, Any]):
        left = weights.left
        found = sorted({int(m[1]) for k in left if (m := re.match(r"enc\.(\d+)x\d+_", k))}, reverse=True)
        if not found or f"enc.{found[0]}x{found[0]}_conv.weight" not in left or "map_layer0.weight" not in left:
            hint = ""
            if any(k.endswith("emb_gain") for k in left):
                hint = " It looks like one of EDM2, which has no counterpart here: load its weights into a network of their code"
                hint += " (scoresde.interop.network_of reads them from a snapshot), and wrap that by WrappedNet.edm."
            raise ValueError(
                f"{weights.source} does not hold a U-Net of EDM (with names such as model.enc.32x32_conv.weight).{hint}"
            )
        self.resolutions = found
        self.adm = "out_conv.weight" in left
        name = lambda r, part: f"enc.{r}x{r}_{part}"  # noqa: E731
        first = left[name(found[0], "conv.weight")]
        self.channels, self.width = first.shape[1], first.shape[0]
        self.out = left["out_conv.weight" if self.adm else f"dec.{found[0]}x{found[0]}_aux_conv.weight"].shape[0]
        counts = {sum(name(r, f"block{i}.conv0.weight") in left for i in range(64)) for r in found}
        if len(counts) != 1:
            raise ValueError(f"{weights.source} has resolutions with different numbers of blocks, {sorted(counts)}.")
        self.blocks = counts.pop()
        self.multipliers = [left[name(r, "block0.conv0.weight")].shape[0] / self.width for r in found]
        self.attention = tuple(r for r in found if name(r, "block0.qkv.weight") in left)
        self.fourier = "map_noise.freqs" in left
        self.frequencies = left["map_layer0.weight"].shape[1] // 2
        self.embedding_width = left["map_layer0.weight"].shape[0]
        self.classes = left["map_label.weight"].shape[1] if "map_label.weight" in left else 0
        joined = {kind for kind in ("skip", "residual") if any(f"_aux_{kind}.weight" in k for k in left)}
        self.input = joined.pop() if joined else "none"
        self.output = "skip" if not self.adm and f"dec.{found[-1]}x{found[-1]}_aux_conv.weight" in left else "none"
        kernels = [v for k, v in left.items() if k.endswith("resample_filter")]
        row = kernels[0][0, 0].sum(0) if kernels else torch.ones(2)
        self.taps = tuple(round(float(v), 4) for v in row / row.abs().min())
        self._agree(options, weights.source)

    def _agree(self, options: dict[str, Any], source: str) -> None:
        """`ValueError` where options that are given contradict the weights; a warning for unknown ones."""
        seen = {
            "img_resolution": self.resolutions[0],
            "img_channels": self.channels,
            "label_dim": self.classes,
            "num_blocks": self.blocks,
            "model_type": "DhariwalUNet" if self.adm else "SongUNet",
            "embedding_type": "fourier" if self.fourier else "positional",
            "encoder_type": "standard" if self.input == "none" else self.input,
            "decoder_type": "standard" if self.output == "none" else self.output,
            "resample_filter": self.taps,
            "attn_resolutions": self.attention,
        }
        if not self.adm:  # whose first multiplier is in the width already
            seen |= {"model_channels": self.width, "channel_mult": tuple(self.multipliers)}
        given = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in options.items()}
        if "attn_resolutions" in given:
            given["attn_resolutions"] = tuple(r for r in self.resolutions if r in given["attn_resolutions"])
            if self.adm and set(self.attention) <= set(given["attn_resolutions"]):
                given.pop("attn_resolutions")  # it has no attention where there are less than 64 channels
        for key, value in seen.items():
            if given.get(key) not in (None, value):
                raise ValueError(
                    f"the configuration says {key}={options[key]!r}, the weights in {source} say {value!r}."
                )
        unknown = sorted(
            options.keys()
            - seen.keys()
            - set(_SEEN.split())
            - {"precond", "sigma_data", "beta_d", "beta_min", "epsilon_t"}
        )
        if unknown:
            warnings.warn(
                f"options of {source} that are not known and were not used: {', '.join(unknown)}.", stacklevel=4
            )


def _model(plan: _Plan, weights: Weights, options: dict[str, Any]) -> ScoreNet:
    size = (plan.resolutions[0],) * 2
    fir = plan.taps != (1.0, 1.0) or plan.input == "residual"
    with weights.sketch():
        net = UNet(
            plan.channels,
            plan.channels,
            size,
            width=plan.width,
            multipliers=plan.multipliers,
            blocks=plan.blocks,
            attention=plan.attention,
            attention_up="all" if plan.adm else "last",
            middle_attention=f"dec.{plan.resolutions[-1]}x{plan.resolutions[-1]}_in0.qkv.weight" in weights,
            head_channels=64 if plan.adm else None,
            resample="fir" if fir else "mean",
            taps=plan.taps,
            project_resampled=not plan.adm,
            modulation="scale_shift" if plan.adm else "shift",
            rescale_skips=not plan.adm,
            progressive_input=plan.input,
            progressive_output=plan.output,
            embedding="sinusoidal" if plan.fourier else "positional",
            frequencies=plan.frequencies,
            embedding_width=plan.embedding_width,
            classes=plan.classes,
            join="output" if plan.adm else "hidden",
            eps=1e-5 if plan.adm else 1e-6,
            dropout=float(options.get("dropout", 0.0)),
        )
    sde, parameterization, label = _precond(options, weights)
    return ScoreNet(
        net,
        sde,
        parameterization,
        label=label,
        sigma_data=float(options.get("sigma_data", 0.5)),
        event_shape=(plan.channels, *size),
        levels=256,
    )


def _precond(options: dict[str, Any], weights: Weights) -> tuple[SDE, str, NoiseLabel]:
    kind = str(options.get("precond", options.get("class_name", "iddpm" if "u" in weights else "edm")))
    kind = kind.split(".")[-1]  # of a class with its module
    kind = PRECONDITIONINGS.get(kind.lower(), kind)
    if kind == "EDMPrecond":
        low, high = float(options.get("sigma_min", 0.0)), float(options.get("sigma_max", math.inf))
        return EDMSDE(low or 0.002, high if math.isfinite(high) else 80.0), "edm", NoiseLabel("log_sigma", 0.25)
    if kind == "VPPrecond":
        low = float(options.get("beta_min", 0.1))
        sde: SDE = VPSDE(low, low + float(options.get("beta_d", 19.9)), float(options.get("epsilon_t", 1e-5)))
        return sde, "noise", NoiseLabel("time", float(options.get("M", 1000)) - 1)
    if kind == "VEPrecond":
        sde = VESDE(float(options.get("sigma_min", 0.02)), float(options.get("sigma_max", 100.0)))
        return sde, "scaled_score", NoiseLabel("log_sigma", 1.0, math.log(0.5))
    if kind == "iDDPMPrecond":
        if "u" not in weights:
            raise ValueError(f"{weights.source} lacks the table u of noise levels that iDDPMPrecond has.")
        sigma = weights.left["u"].double().flip(0)[1:]  # ascending; the first is 0
        alpha_bar = 1 / (1 + sigma**2)
        betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return DiscreteVPSDE(tuple(betas.tolist())), "noise", NoiseLabel("time", len(betas) - 1.0)
    raise ValueError(f"unknown preconditioning {kind!r}; known are {', '.join(PRECONDITIONINGS)}.")


def _renamed(net: UNet, plan: _Plan, weights: Weights) -> Names:
    """Our names with the file's tensors."""

    def layer(own: str, theirs: str) -> Names:
        for kind in ("weight", "bias"):
            yield f"{own}.{kind}", weights.take(f"{theirs}.{kind}")

    def block(own: str, theirs: str, module: Any, attention: str = "") -> Names:
        for ours, name in (
            ("norm1", "norm0"),
            ("conv1", "conv0"),
            ("modulate", "affine"),
            ("norm2", "norm1"),
            ("conv2", "conv1"),
        ):
            yield from layer(f"{own}.{ours}", f"{theirs}.{name}")
        if not isinstance(module.skip, torch.nn.Identity):
            yield from layer(f"{own}.skip", f"{theirs}.skip")
        if attention:
            yield from layer(f"{attention}.norm", f"{theirs}.norm2")
            heads = cast(SelfAttention, net.get_submodule(attention)).heads
            for kind in ("weight", "bias"):
                value = weights.take(f"{theirs}.qkv.{kind}")
                value = value.reshape(len(value), -1)
                if value.numel():  # their channels run over (head, channel, which of q, k, v)
                    value = value.reshape(heads, -1, 3, value.shape[1]).permute(2, 0, 1, 3).flatten(0, 2)
                yield f"{attention}.qkv.{kind}", value.squeeze(1) if kind == "bias" else value
            for kind in ("weight", "bias"):
                value = weights.take(f"{theirs}.proj.{kind}")
                yield f"{attention}.out.{kind}", value.flatten(1) if kind == "weight" else value

    def at(way: str, resolution: int, part: str) -> str:
        return f"{way}.{resolution}x{resolution}_{part}"

    yield from _embedding(net, plan, weights)
    yield from layer("enter", at("enc", plan.resolutions[0], "conv"))
    for way, theirs, order in (("down", "enc", plan.resolutions), ("up", "dec", plan.resolutions[::-1])):
        for i, (stage, r) in enumerate(zip(getattr(net, way), order, strict=True)):
            own = f"{way}.{i}"
            for k, module in enumerate(stage.blocks):
                has = not isinstance(stage.attention[k], torch.nn.Identity)
                yield from block(
                    f"{own}.blocks.{k}", at(theirs, r, f"block{k}"), module, f"{own}.attention.{k}" if has else ""
                )
            if stage.resample is not None:
                yield from block(f"{own}.resample", at(theirs, order[i + 1], way), stage.resample)
            if stage.pyramid is not None and way == "down":
                kind = "conv" if plan.input == "skip" else "down.conv"
                yield from layer(f"{own}.pyramid.{kind}", at("enc", order[i + 1], f"aux_{plan.input}"))
            elif stage.pyramid is not None:
                yield from layer(f"{own}.pyramid.head.norm", at("dec", r, "aux_norm"))
                yield from layer(f"{own}.pyramid.head.conv", at("dec", r, "aux_conv"))
    low = plan.resolutions[-1]
    has = not isinstance(net.middle[1], torch.nn.Identity)
    yield from block("middle.0", at("dec", low, "in0"), net.middle[0], "middle.1" if has else "")
    yield from block("middle.2", at("dec", low, "in1"), net.middle[2])
    if net.leave is not None:
        last = "out" if plan.adm else at("dec", plan.resolutions[0], "aux")
        yield from layer("leave.norm", f"{last}_norm")
        for name, value in layer("leave.conv", f"{last}_conv"):
            yield name, value[: plan.channels]  # the rest is a learned variance


def _embedding(net: UNet, plan: _Plan, weights: Weights) -> Names:
    first, bias = weights.take("map_layer0.weight"), weights.take("map_layer0.bias")
    half = plan.frequencies
    if plan.fourier:
        yield "embed.frequencies", 2 * math.pi * weights.take("map_noise.freqs")
    else:
        exponent = torch.arange(half, dtype=torch.float32) / (half - (0 if plan.adm else 1))
        yield "embed.frequencies", (1 / 10000) ** exponent
    if plan.classes:
        table = weights.take("map_label.weight").t()
        if not plan.adm:
            table = (table * math.sqrt(plan.classes)) @ first.t()
            if "map_label.bias" in weights:
                bias = bias + first @ weights.take("map_label.bias")
        yield "embed.classes.weight", torch.cat([table, torch.zeros_like(table[:1])])
    # ADM has the cosines before the sines
    yield "embed.first.weight", first.roll(half, 1) if plan.adm else first
    yield "embed.first.bias", bias
    yield "embed.second.weight", weights.take("map_layer1.weight")
    yield "embed.second.bias", weights.take("map_layer1.bias")
