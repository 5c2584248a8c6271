"""Networks in plain PyTorch: `net(x, label, cond=None)` with a noise label (B,)."""

from scoresde.nets.dit import DiT
from scoresde.nets.lean import LeanUNet
from scoresde.nets.mlp import MLP
from scoresde.nets.presets import NETWORK_PRESETS, preset
from scoresde.nets.refinenet import RefineNet
from scoresde.nets.unet import UNet

NETS: dict[str, type] = {c.__name__: c for c in (UNet, LeanUNet, DiT, MLP, RefineNet)}

__all__ = ["MLP", "NETS", "NETWORK_PRESETS", "DiT", "LeanUNet", "RefineNet", "UNet", "preset"]
