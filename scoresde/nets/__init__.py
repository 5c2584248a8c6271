"""Networks in plain PyTorch: `net(x, label, cond=None)` with a noise label (B,)."""

from scoresde.nets.mlp import MLP
from scoresde.nets.unet import UNet

NETS: dict[str, type] = {"UNet": UNet, "MLP": MLP}

__all__ = ["MLP", "NETS", "UNet"]
