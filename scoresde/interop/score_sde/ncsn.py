"""NCSN and NCSNv2 (Song & Ermon 2019, 2020) in score_sde_pytorch's configurations and names. Layer 4.

The noise levels are a table sigma_i, geometric from sigma_max (i = 0) down to sigma_min (i = N - 1), so `VESDE` passes through
level i at t = 1 - i / (N - 1).

| network | is told | its output |
|---|---|---|
| ncsn | i; between two levels, the nearer | the score |
| ncsnv2 | nothing | sigma times the score |

In score_sde_pytorch as it was published these networks do not run: its dilated convolutions are padded by one pixel whatever
their dilation, and `ncsn` is built with norms that take no label. Meant is what the authors' earlier repositories (ncsn, ncsnv2)
compute, whose names of tensors are the same, and that is what is done here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from scoresde.interop.files import Weights, step_count
from scoresde.models.network import NoiseLabel, ScoreNet
from scoresde.nets.refinenet import ACTIVATIONS, Refine, RefineNet
from scoresde.sde import VESDE

_PLAIN = dict(multipliers=(1, 2, 2, 2), dilations=(1, 1, 2, 4))
NCSN_MODELS: dict[str, dict[str, Any]] = {
    "ncsn": dict(_PLAIN, pool="mean"),
    "ncsnv2_64": dict(_PLAIN, pool="max"),
    "ncsnv2_128": dict(multipliers=(1, 2, 2, 4, 4), dilations=(1, 1, 1, 2, 4), pool="max"),
    "ncsnv2_256": dict(multipliers=(1, 2, 2, 2, 4, 4), dilations=(1, 1, 1, 1, 2, 4), pool="max"),
}


def build_ncsn(options: dict[str, Any], weights: Weights) -> ScoreNet:
    """A model from the original's options, its network a sketch for `Weights.fill`; the width is read off the weights.

    A table of noise levels in the file is used up: it has to be the one that the options describe. Raises `ValueError`.
    """
    try:
        training, data, net = options["training"], options["data"], options["model"]
        name, steps = str(net["name"]).lower(), step_count(net["num_scales"], "num_scales")
        _check(name, training, net)
        sde = VESDE(float(net["sigma_min"]), float(net["sigma_max"]))
        size, centred = int(data["image_size"]), bool(data["centered"])
        # their configurations have the one, their code asks for the other
        channels = int(data.get("num_channels", data.get("channels", 3)))
        first = weights.left.get("begin_conv.weight")
        with weights.sketch():
            made = RefineNet(
                channels,
                (size, size),
                width=int(net["nf"]) if first is None else first.shape[0],
                activation=str(net["nonlinearity"]).lower(),
                steps=steps if name == "ncsn" else 0,
                rescale_input=not centred,
                **NCSN_MODELS[name],
            )
    except KeyError as e:
        raise ValueError(f"the configuration lacks the option {e}; give the original's in full.") from e
    if "sigmas" in weights:
        _check_table(weights.take("sigmas"), sde, steps, weights.source)
    return ScoreNet(
        made,
        sde,
        "score" if name == "ncsn" else "scaled_score",
        label=NoiseLabel("time", 1.0 - steps, steps - 1.0),
        sigma_data=0.5 if centred else 0.25,
        event_shape=(channels, size, size),
        levels=256,
        value_range=(-1.0, 1.0) if centred else (0.0, 1.0),
    )


def _check(name: str, training: dict[str, Any], net: dict[str, Any]) -> None:
    """`ValueError` for what the originals cannot do, or what is not supported here."""
    if name not in NCSN_MODELS:
        raise ValueError(f"the network {name!r} is not supported; known are {', '.join(NCSN_MODELS)}.")
    if str(training["sde"]).lower() != "vesde":
        raise ValueError(f"training.sde {training['sde']!r} does not go with {name}, which has the levels of vesde.")
    # one of the published configurations misspells the option
    if training.get("continuouse", training["continuous"]):
        raise ValueError(f"training.continuous does not go with {name}, which has discrete noise levels.")
    for option, wanted in (("normalization", "InstanceNorm++"), ("interpolation", "bilinear")):
        if str(net.get(option, wanted)).lower() != wanted.lower():
            raise ValueError(f"{option} {net[option]!r} is not supported; published {name} networks have {wanted}.")
    if str(net["nonlinearity"]).lower() not in ACTIVATIONS:
        raise ValueError(f"unknown nonlinearity {net['nonlinearity']!r}; known are {', '.join(ACTIVATIONS)}.")
    divided = name != "ncsn"  # in the code itself, whatever this option says
    if bool(net.get("scale_by_sigma", divided)) != divided:
        raise ValueError(
            f"scale_by_sigma={net['scale_by_sigma']} does not go with {name}, whose output is "
            f"{'always' if divided else 'never'} divided by sigma."
        )


def _check_table(table: Tensor, sde: VESDE, steps: int, source: str) -> None:
    expected = sde.sigma(torch.linspace(1, 0, steps, dtype=torch.float64))
    if table.shape != expected.shape or not torch.allclose(table.double(), expected, rtol=1e-4):
        raise ValueError(
            f"the noise levels in {source}, {table.numel()} from {float(table[0]):g} to {float(table[-1]):g}, are not those "
            f"of its configuration, {steps} from {sde.sigma_max:g} to {sde.sigma_min:g}. Check sigma_min, sigma_max and "
            "num_scales."
        )


def ncsn_weights(net: RefineNet, weights: Weights) -> dict[str, Tensor]:
    """The network's own names with the file's tensors, which are used up."""
    found: dict[str, Tensor] = {}
    # the deepest network's extra stage stands after the third one and is called 31
    finest_first = ["1", "2", "3", "31", "4", "5"] if len(net.down) == 6 else [str(i + 1) for i in range(len(net.down))]
    coarsest_first = ["1", "2", "31", "3", "4", "5"] if len(net.up) == 6 else finest_first

    def conv(own: str, theirs: str) -> None:
        for kind, _ in net.get_submodule(own).named_parameters():
            # a convolution that a mean follows is one module further inside
            found[f"{own}.{kind}"] = weights.take(f"{theirs}.{kind}", f"{theirs}.conv.{kind}")

    def layer(own: str, convolution: str, norm: str) -> None:
        conv(f"{own}.conv", convolution)
        if net.get_submodule(own).norm is None:
            return
        if net.steps:
            found[f"{own}.norm.table"] = weights.take(f"{norm}.embed.weight")
        else:
            parts = [weights.take(f"{norm}.{part}") for part in ("gamma", "alpha", "beta")]
            found[f"{own}.norm.table"] = torch.cat(parts)[None]

    def units(own: str, theirs: str) -> None:
        for i in range(len(cast(nn.ModuleList, net.get_submodule(own)))):
            for k, which in enumerate(("first", "second"), 1):
                layer(f"{own}.{i}.{which}", f"{theirs}.{i + 1}_{k}_conv", f"{theirs}.{i + 1}_{k}_norm")

    conv("enter", "begin_conv")
    for i, number in enumerate(finest_first):
        for j, block in enumerate(cast(nn.ModuleList, net.down[i])):
            own, theirs = f"down.{i}.{j}", f"res{number}.{j}"
            layer(f"{own}.first", f"{theirs}.conv1", f"{theirs}.normalize1")
            layer(f"{own}.second", f"{theirs}.conv2", f"{theirs}.normalize2")
            if block.skip is not None:
                conv(f"{own}.skip", f"{theirs}.shortcut")
    for i, number in enumerate(coarsest_first):
        own, theirs = f"up.{i}", f"refine{number}"
        stage = cast(Refine, net.up[i])
        for j in range(len(stage.adapt)):
            units(f"{own}.adapt.{j}", f"{theirs}.adapt_convs.{j}")
        for ours, part in (("join", "msf"), ("chain", "crp")):
            for j in range(len(getattr(stage, ours) or ())):
                layer(f"{own}.{ours}.{j}", f"{theirs}.{part}.convs.{j}", f"{theirs}.{part}.norms.{j}")
        units(f"{own}.units", f"{theirs}.output_convs")
    layer("leave", "end_conv", "normalizer")
    return found


def _published() -> dict[str, dict[str, Any]]:
    """The published configurations by the name of their file, as far as they decide the model."""

    def options(name: str, size: int, top: float, steps: int) -> dict[str, Any]:
        model = dict(name=name, scale_by_sigma=name != "ncsn", sigma_min=0.01, sigma_max=top, num_scales=steps, nf=128)
        model |= dict(normalization="InstanceNorm++", nonlinearity="elu", interpolation="bilinear")
        return {
            "training": {"sde": "vesde", "continuous": False},
            "data": {"image_size": size, "centered": False, "num_channels": 3},
            "model": model,
        }

    found = {}
    for data, size, top, steps in (("cifar10", 32, 50.0, 232), ("celeba", 64, 90.0, 500)):
        # numbers are the techniques of Song & Ermon 2020 in use: 1, 2 and 4 choose the levels, 5 is the average of weights
        for suffix in ("", "_5"):
            found[f"ve/ncsn/{data}{suffix}"] = options("ncsn", size, 1.0, 10)
        for suffix in ("_124", "_1245"):
            found[f"ve/ncsn/{data}{suffix}"] = options("ncsn", size, top, steps)
        found[f"ve/ncsnv2/{data}"] = options("ncsnv2_64", size, top, steps)
    found["ve/ncsnv2/bedroom"] = options("ncsnv2_128", 128, 190.0, 1086)
    return found


PUBLISHED_NCSN = _published()
