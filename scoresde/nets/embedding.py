"""The embedding of the noise label. Layer 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("sinusoidal", "positional", "fourier")


class NoiseEmbedding(nn.Module):
    r"""A noise label (B,) -> (B, width).

    Features sin and cos of the label at fixed frequencies $\omega_j$, then two linear layers with SiLU after each:

    | kind | $\omega_j$, j = 0 ... `frequencies` - 1 | for labels |
    |---|---|---|
    | sinusoidal | geometric between 0.27 and 24 rad per unit | of order 1: t, ln(sigma)/4 |
    | positional | $10000^{-j/(n-1)}$ (Vaswani et al. 2017; Ho et al. 2020) | 0 to 1000 |
    | fourier | $2\pi\,$`scale`$\,N(0, 1)$, drawn once (Tancik et al. 2020; Song et al. 2021) | of order 1: ln(sigma) |

    Raises `ValueError` for an unknown kind, and for a label of another shape.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 16, *, kind: str = "sinusoidal", scale: float = 16.0):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown noise embedding {kind!r}; use one of {', '.join(KINDS)}.")
        if min(width, frequencies) < 1:
            raise ValueError(f"width and frequencies must be at least 1, got {width} and {frequencies}.")
        self.register_buffer("frequencies", _frequencies(kind, frequencies, scale))
        self.turn = 2 * math.pi if kind == "fourier" else 1.0
        self.first = nn.Linear(2 * frequencies, width)
        self.second = nn.Linear(width, width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseEmbedding:
        """Moves and casts, of which a cast to half precision spares the frequencies: rounded, they would lose the angles."""
        kept = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype in (torch.bfloat16, torch.float16):
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, label: Tensor) -> Tensor:
        return self._embed(label)

    def _embed(self, label: Tensor, hidden: Tensor | None = None, output: Tensor | None = None) -> Tensor:
        """The embedding, where `hidden` and `output` (B, width) join the results of the first and the second layer."""
        if label.dim() != 1:
            raise ValueError(f"the noise label must have shape (B,), one number per example, got {tuple(label.shape)}.")
        label = label.to(torch.promote_types(label.dtype, torch.float32))
        angle = label[:, None] * self.frequencies.to(label.dtype)
        if self.turn != 1.0:
            angle = angle * self.turn
        h = self.first(waves(angle).to(self.first.weight.dtype))
        h = self.second(F.silu(h if hidden is None else h + hidden))
        return F.silu(h if output is None else h + output)


def waves(angle: Tensor) -> Tensor:
    """(B, n) -> (B, 2 n), sines and then cosines."""
    return torch.cat([angle.sin(), angle.cos()], 1)


def geometric_frequencies(count: int, device: torch.device | None = None) -> Tensor:
    """From 1 to 1/10000 rad per unit (count,), the only one being 1."""
    steps = torch.arange(count, dtype=torch.float32, device=device)
    return torch.exp(steps * -(math.log(10000) / max(count - 1, 1)))


def _frequencies(kind: str, count: int, scale: float) -> Tensor:
    if kind == "sinusoidal":
        return torch.exp(torch.linspace(-1.3, 3.2, count))
    if kind == "positional":
        return geometric_frequencies(count)
    return torch.randn(count) * scale
