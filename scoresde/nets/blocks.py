"""Building blocks of the networks, for 1, 2 or 3 spatial axes. Layer 0: nothing here knows of SDEs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Layer = TypeVar("Layer", bound=nn.Linear | _ConvNd)
CONV: dict[int, Callable[..., _ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def check_input(x: Tensor, label: Tensor, rank: int, channels: int) -> None:
    """`ValueError` unless x is (B, channels, *) with `rank` spatial axes and label (B,); nothing is broadcast."""
    if x.dim() != rank + 2 or x.shape[1] != channels or label.shape[:1] != x.shape[:1]:
        wanted = ", ".join(["B", str(channels), *"*" * rank])
        raise ValueError(
            f"this network takes x of shape ({wanted}) and labels of shape (B,), got "
            f"{tuple(x.shape)} and {tuple(label.shape)}."
        )


def zero_(module: Layer) -> Layer:
    """The module with weight and bias at zero, so that its block starts as the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def xavier_(module: Layer) -> Layer:
    """The module with uniform weights of variance 2 / (fan in + fan out) and no bias (Ho et al. 2020)."""
    nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def spread(features: Tensor, x: Tensor) -> Tensor:
    """(B, c) in the shape that adds to x (B, c, *)."""
    return features.reshape(*features.shape, *(1,) * (x.dim() - 2))


def through(blocks: nn.Module, h: Tensor, *others: Tensor | None) -> Tensor:
    """h after one block after the other, each called with it and with `others`."""
    for block in blocks.children():
        h = block(h, *others)
    return h


def transforming() -> bool:
    """Whether a transformation of `torch.func` is under way, in which values cannot be looked at."""
    return getattr(torch._C, "_are_functorch_transforms_active", lambda: True)()


def attend(q: Tensor, k: Tensor, v: Tensor, training: bool) -> Tensor:
    """Softmax attention, (B, heads, n, d) each.

    `scaled_dot_product_attention`, whose fast kernels have a first derivative in reverse mode and no other. Where more
    may be asked for, which is in forward mode, under `torch.func` and, outside of training, wherever gradients are on, it
    is written out.
    """
    plain = torch.is_grad_enabled() and not training
    if not plain and not torch.compiler.is_compiling():
        plain = transforming() or any(torch.autograd.forward_ad.unpack_dual(u).tangent is not None for u in (q, k, v))
    if not plain:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1) @ v


class SelfAttention(nn.Module):
    """x + attention over all positions of group-normed x (B, c, *), over sqrt(2) with `rescale`; `heads` divides c."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module], heads: int = 1, rescale: bool = False):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"channels ({channels}) must be a multiple of heads, at least 1, got {heads}.")
        self.heads, self.gain = heads, 0.5**0.5 if rescale else None
        self.norm = norm(channels)
        self.qkv = xavier_(nn.Linear(channels, 3 * channels))
        self.out = zero_(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, n, c)
        b, n, c = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        h = attend(q, k, v, self.training).transpose(1, 2).reshape(b, n, c)
        h = x + self.out(h).transpose(1, 2).reshape(x.shape)
        return h if self.gain is None else h * self.gain


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a skip connection; (B, c_in, *), (B, embedding) -> (B, c_out, *).

    The embedding shifts the second norm's input, or with `modulation="scale_shift"` scales and shifts its output. A
    `resample` module stands before the first convolution and in the skip connection (the BigGAN form). The skip is a 1x1
    convolution where channels change, and with `project` where the resolution does. `rescale` divides the sum by sqrt(2).
    """

    def __init__(
        self,
        rank: int,
        c_in: int,
        c_out: int,
        embedding: int,
        norm: Callable[[int], nn.Module],
        *,
        dropout: float = 0.0,
        modulation: str = "shift",
        rescale: bool = False,
        resample: nn.Module | None = None,
        project: bool = True,
    ):
        super().__init__()
        conv = CONV[rank]
        self.scale_shift = modulation == "scale_shift"
        self.gain = 0.5**0.5 if rescale else None
        self.norm1 = norm(c_in)
        self.resample = resample
        self.conv1 = xavier_(conv(c_in, c_out, 3, padding=1))
        self.modulate = xavier_(nn.Linear(embedding, c_out * (1 + self.scale_shift)))
        self.norm2 = norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(conv(c_out, c_out, 3, padding=1))
        changes = c_in != c_out or (resample is not None and project)
        self.skip = xavier_(conv(c_in, c_out, 1)) if changes else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        modulation = spread(self.modulate(embedding), h)
        if self.scale_shift:
            scale, shift = modulation.chunk(2, 1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + modulation)
        h = self.skip(x) + self.conv2(self.dropout(F.silu(h)))
        return h if self.gain is None else h * self.gain
