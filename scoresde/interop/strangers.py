"""Checkpoints that cannot be loaded here, since their networks have no counterpart: what they are and what to do. Layer 4."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# (what a name in the file looks like, whose it is, what to do); the first that fits is said
_KNOWN = (
    (
        r"(^|\.)init_conv\.weight$",
        "a checkpoint of denoising-diffusion-pytorch",
        "Build its GaussianDiffusion, load the weights into it ({where}), and use WrappedNet(diffusion.model, "
        "betas=diffusion.betas, predicts='v_prediction') or what else its objective is (pred_noise: 'noise', pred_x0: 'denoise').",
    ),
    (
        r"(^|\.)inner_model\.",
        "a checkpoint of k-diffusion",
        "Make its model and denoiser from its configuration, load the weights into the model ({where}), and use "
        "WrappedNet.edm(denoiser, cond_name='class_cond').",
    ),
    (
        r"(^|\.)input_blocks\.0\.0\.weight$",
        "a network of guided-diffusion or of latent diffusion, as OpenAI and CompVis name its layers",
        "Make it by their code, load the weights into it ({where}), and use WrappedNet(net, betas=..., predicts='noise', "
        "learned_variance=True) where it also predicts a variance.",
    ),
    (
        r"(^|\.)emb_fourier\.freqs$",
        "a network of EDM2",
        "Make it by NVIDIA's code, load the weights into it ({where}), and use WrappedNet.edm(net).",
    ),
)


def stranger(path: Path, state: Any) -> ValueError:
    """The error for what a file holds that is none of the kinds that can be loaded."""
    parts = dict(_state_dicts(state))
    where = " or ".join(f"state[{key!r}]" if key else "all of it" for key in parts)
    for pattern, what, advice in _KNOWN:
        if any(re.search(pattern, name) for names in parts.values() for name in names):
            return _error(path, what, advice.format(where=where))
    if not parts:
        held = (
            f"with the entries {', '.join(map(str, list(state)[:8]))}"
            if isinstance(state, Mapping)
            else type(state).__name__
        )
        return _error(
            path, f"no set of weights ({held})", "Save the network's state_dict() and load that into your own network."
        )
    what = "the state of a training" if "" not in parts else "a state dict"
    names = next(iter(parts.values()))
    shown = f"{what} whose network is not known here ({where}: {len(names)} tensors, {', '.join(names[:3])}, ...)"
    advice = (
        f"Load {where} into your own network, for example by net.load_state_dict(torch.load(path, weights_only=True)"
    )
    first = next(iter(parts))
    return _error(
        path, shown, f"{advice}{f'[{first!r}]' if first else ''}), and use WrappedNet(net, sde, predicts='noise')."
    )


def _error(path: Path, what: str, advice: str) -> ValueError:
    return ValueError(
        f"{path} was written by another program and is {what}. It cannot be loaded by itself. {advice} Loaded are "
        "score_sde_pytorch's checkpoint_N.pth, networks of EDM, folders of diffusers and model.safetensors of this package; a "
        "pickled module never is."
    )


def _state_dicts(state: Any) -> Iterator[tuple[str, list[str]]]:
    """(key, names) of each state dict in what a file holds; the key is "" where all of it is one."""
    if not isinstance(state, Mapping):
        return
    if _is_state_dict(state):
        yield "", [str(k) for k in state]
        return
    for key, value in state.items():
        if _is_state_dict(value):
            yield str(key), [str(k) for k in value]


def _is_state_dict(value: Any) -> bool:
    """A mapping most of which are names of tensors; averages keep a counter or a flag beside them."""
    if not isinstance(value, Mapping) or not value:
        return False
    return sum(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()) > len(value) / 2
