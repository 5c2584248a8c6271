r"""Halving and doubling a resolution, for 1, 2 or 3 spatial axes. Layer 0.

With FIR taps k (a low-pass filter such as 1 3 3 1) of unit sum, along each axis,

$$\text{down}(x)_i = \sum_j k_j\, x_{2i + p - j}, \qquad \text{up}(x) = 2\,k * (x \text{ with zeros between}),$$

zeros beyond the edges, p such that the result is centred (Zhang 2019; Karras et al. 2020, StyleGAN2; NCSN++). The taps
1 1 make these the mean of two neighbours and the repetition of each value.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import CONV, xavier_

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class _Filter(nn.Module):
    """Depthwise convolution with the outer power of the taps."""

    def __init__(self, rank: int, taps: Sequence[float]):
        super().__init__()
        taps = tuple(float(v) for v in taps)
        if len(taps) < 2 or sum(taps) == 0.0:
            raise ValueError(f"taps must be at least two numbers with a sum other than 0, got {taps}.")
        self.rank, self.taps = rank, taps
        unit = np.array(taps[::-1]) / sum(taps)
        kernel = torch.tensor(functools.reduce(np.multiply.outer, [unit] * rank), dtype=torch.float32)
        self.register_buffer("kernel", kernel, persistent=False)

    def _filter(self, x: Tensor, kernel: Tensor, stride: int) -> Tensor:
        c = x.shape[1]
        weight = kernel.to(x.dtype).expand(c, 1, *kernel.shape)
        return _CONV[self.rank](x, weight, stride=stride, groups=c)


class Down(_Filter):
    """(B, c, *) -> (B, c, * / 2): filter by the taps, keep every second value. `tail` keeps that many more per side."""

    def __init__(self, rank: int, taps: Sequence[float] = (1, 1), tail: int = 0):
        super().__init__(rank, taps)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        if self.taps == (1.0, 1.0) and not self.tail:
            return _POOL[self.rank](x, 2)
        p, t = len(self.taps) - 2, self.tail
        x = F.pad(x, ((p + 1) // 2 + t, p // 2 + t) * self.rank)
        # with a tail this is the filter alone: the convolution that follows has the stride
        return self._filter(x, self.kernel, 1 if self.tail else 2)


class Up(_Filter):
    """(B, c, *) -> (B, c, 2 *): zeros between the values, filter by the taps.

    Even and odd results each use every second tap, so this is one convolution of the small input per parity.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.taps == (1.0, 1.0):
            return F.interpolate(x, scale_factor=2, mode="nearest")
        for axis in range(2, x.dim()):
            x = self._double(x, axis)
        return x

    def _double(self, x: Tensor, axis: int) -> Tensor:
        total = sum(self.taps)
        taps = [2 * v / total for v in self.taps]
        n, p = len(taps), len(taps) - 2
        first = (p + 1) // 2 + 1  # zeros before the first value, counted on the fine grid
        size = x.shape[axis]
        halves = []
        for parity in (0, 1):
            half = None
            for j in range(n):
                # fine position parity + 2 i takes tap j from fine position parity + 2 i + j - first
                offset = parity + j - first
                if offset % 2:
                    continue
                part = _shifted(x, offset // 2, axis, size) * taps[n - 1 - j]
                half = part if half is None else half + part
            halves.append(half)
        return torch.stack(halves, axis + 1).flatten(axis, axis + 1)


def _shifted(x: Tensor, by: int, axis: int, size: int) -> Tensor:
    """y_i = x_{i + by} along an axis, zeros beyond the edges."""
    if by == 0:
        return x
    pads = [0, 0] * (x.dim() - axis - 1) + [max(-by, 0), max(by, 0)]
    return F.pad(x, pads).narrow(axis, max(by, 0), size)


class ConvDown(nn.Module):
    """(B, c_in, *) -> (B, c_out, * / 2) by a strided 3x3 convolution, after the taps where given.

    Without taps, zeros are added at the far end only, as DDPM does, or at both with `centred`.
    """

    def __init__(self, rank: int, c_in: int, c_out: int, taps: Sequence[float] | None = None, *, centred: bool = False):
        super().__init__()
        self.rank, self.centred = rank, centred
        self.filter = None if taps is None else Down(rank, taps, tail=1)
        self.conv = xavier_(CONV[rank](c_in, c_out, 3, stride=2))

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        if self.filter is not None:
            return self.conv(self.filter(x))
        return self.conv(F.pad(x, ((1, 1) if self.centred else (0, 1)) * self.rank))


class ConvUp(nn.Module):
    """(B, c_in, *) -> (B, c_out, 2 *) by repetition, or by the taps where given, and a 3x3 convolution."""

    def __init__(self, rank: int, c_in: int, c_out: int, taps: Sequence[float] | None = None):
        super().__init__()
        self.up = Up(rank, (1, 1) if taps is None else taps)
        self.conv = xavier_(CONV[rank](c_in, c_out, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.conv(self.up(x))


class Plain(nn.Module):
    """A resampling without parameters where others also take the embedding."""

    def __init__(self, resample: nn.Module):
        super().__init__()
        self.resample = resample

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.resample(x)
