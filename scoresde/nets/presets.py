"""Networks of published sizes by name. Layer 0.

`preset("ncsn++")` is the network of NCSN++ cont. on CIFAR-10 with the parameter count of its paper; every option can be
changed: `preset("ncsn++", size=(64, 64), dropout=0.2)`. What they were trained with is a matter of `ScoreNet`:
DDPM++ under VP with label 999 t, NCSN++ under VE with ln sigma, EDM's with ln(sigma)/4.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from scoresde.nets.dit import DiT
from scoresde.nets.unet import UNet

_RGB = dict(in_channels=3, out_channels=3)
_DDPMPP = _RGB | dict(size=(32, 32), width=128, multipliers=(1, 2, 2, 2), blocks=4, attention=(16,), dropout=0.1)
_NCSNPP = _DDPMPP | dict(resample="fir", progressive_input="residual", embedding="fourier", rescale_input=True)
_LARGE = _NCSNPP | dict(progressive_input="skip", progressive_output="skip", dropout=0.0)
_EDM_DDPMPP = _DDPMPP | dict(multipliers=(2, 2, 2), embedding="sinusoidal", frequencies=64, dropout=0.13)
_EDM_NCSNPP = _EDM_DDPMPP | dict(resample="fir", progressive_input="residual", frequencies=128)
_EDM_64 = dict(size=(64, 64), multipliers=(1, 2, 2, 2), dropout=0.05)
_LATENT = dict(in_channels=4, out_channels=4, size=(32, 32), patch=2, classes=1000, drop_cond=0.1)

# Song et al. 2021, appendix H and table 3; Ho et al. 2020; Karras et al. 2022, table 7; Peebles & Xie 2023, table 1
NETWORK_PRESETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "ddpm": (UNet, _DDPMPP | dict(blocks=2, residual="ddpm", resample="conv", rescale_skips=False, group_channels=1)),
    "ddpm++": (UNet, _DDPMPP),
    "ddpm++-deep": (UNet, _DDPMPP | dict(blocks=8)),
    "ncsn++": (UNet, _NCSNPP),
    "ncsn++-deep": (UNet, _NCSNPP | dict(blocks=8)),
    "ncsn++-256": (UNet, _LARGE | dict(size=(256, 256), multipliers=(1, 1, 2, 2, 2, 2, 2), blocks=2)),
    "ncsn++-1024": (
        UNet,
        _LARGE | dict(size=(1024, 1024), width=16, multipliers=(1, 2, 4, 8, 16, 32, 32, 32), blocks=1),
    ),
    "edm-ddpm++-32": (UNet, _EDM_DDPMPP),
    "edm-ncsn++-32": (UNet, _EDM_NCSNPP),
    "edm-ddpm++-64": (UNet, _EDM_DDPMPP | _EDM_64),
    "edm-ncsn++-64": (UNet, _EDM_NCSNPP | _EDM_64),
    "edm-adm-64": (
        UNet,
        _RGB
        | dict(
            size=(64, 64),
            width=192,
            multipliers=(1, 2, 3, 4),
            blocks=3,
            attention=(32, 16, 8),
            attention_up="all",
            head_channels=64,
            project_resampled=False,
            modulation="scale_shift",
            rescale_skips=False,
            embedding="sinusoidal",
            frequencies=96,
            classes=1000,
            join="output",
            eps=1e-5,
            dropout=0.1,
        ),
    ),
    "dit-s/2": (DiT, _LATENT | dict(width=384, depth=12, heads=6)),
    "dit-b/2": (DiT, _LATENT | dict(width=768, depth=12, heads=12)),
    "dit-l/2": (DiT, _LATENT | dict(width=1024, depth=24, heads=16)),
    "dit-xl/2": (DiT, _LATENT | dict(width=1152, depth=28, heads=16)),
}


def preset(name: str, **changes: Any) -> nn.Module:
    """A freshly initialised network of a published size, with `changes` to its options.

    Trainable parameters in millions: ddpm 35.2, ddpm++ 61.8 (deep 106.6), ncsn++ 62.8 (deep 107.6; 65.6 for 256 pixels, 105.8
    for 1024), EDM's ddpm++ 55.7 and ncsn++ 56.4 at 32 pixels, 61.8 and 62.8 at 64, adm 295.9, DiT 33 to 675. The networks of
    EDM have the same numbers but our features of the logarithm. Raises `ValueError` for an unknown name and `TypeError` for an
    unknown option.
    """
    if name not in NETWORK_PRESETS:
        raise ValueError(f"unknown network {name!r}; use one of {', '.join(NETWORK_PRESETS)}.")
    kind, options = NETWORK_PRESETS[name]
    return kind(**options | changes)
