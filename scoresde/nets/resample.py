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
_UP = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def pad_to_multiple(x: Tensor, factors: Sequence[int]) -> Tensor:
    """x (B, c, *) with zeros around it, each spatial axis the next multiple of its factor; `crop` undoes it.

    Zeros are what convolutions see beyond an edge in any case, and exist at every size (a reflection needs an axis longer
    than itself). Linear in x, so the derivatives of a network with padding and cropping are those of a map of x's own shape.
    """
    missing = [-n % f for n, f in zip(x.shape[2:], factors, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [part for m in reversed(missing) for part in (m // 2, m - m // 2)])


def check_padding(size: Sequence[int], halvings: int) -> None:
    """`ValueError` where padding to what can be halved so often would more than double an axis."""
    if any(n <= 2 ** (halvings - 1) for n in size):
        raise ValueError(
            f"{halvings} halvings of size {tuple(size)} would more than double it by padding; use fewer resolutions."
        )


def crop(y: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of y (B, c, *), of spatial size `size`."""
    for axis, n in enumerate(size, start=2):
        if y.shape[axis] != n:
            y = y.narrow(axis, (y.shape[axis] - n) // 2, n)
    return y


class _Filter(nn.Module):
    """Depthwise convolution with the outer power of the taps."""

    kernel: Tensor

    def __init__(self, rank: int, taps: Sequence[float]):
        super().__init__()
        taps = tuple(float(v) for v in taps)
        if len(taps) < 2 or sum(taps) == 0.0:
            raise ValueError(f"taps must be at least two numbers with a sum other than 0, got {taps}.")
        self.rank, self.taps = rank, taps
        unit = np.array(taps[::-1]) / sum(taps)
        kernel = torch.tensor(functools.reduce(np.multiply.outer, [unit] * rank), dtype=torch.float32)
        self.register_buffer("kernel", kernel, persistent=False)

    def _weight(self, x: Tensor, gain: float = 1.0) -> Tensor:
        kernel = self.kernel.to(x.dtype)
        return (kernel if gain == 1.0 else kernel * gain).expand(x.shape[1], 1, *kernel.shape)

    def _plain(self, x: Tensor) -> bool:
        """Whether to take the library's mean and repetition: on a CPU a convolution is faster (but in channels_last)."""
        if len(self.taps) != 2 or self.taps[0] != self.taps[1]:
            return False
        return x.device.type != "cpu" or (self.rank == 3 and x.dtype in (torch.float32, torch.float64))


class Down(_Filter):
    """(B, c, *) -> (B, c, * / 2): filter by the taps, keep every second value.

    With `tail` it is the filter alone, one value longer at the front, for a strided 3x3 convolution to follow.
    """

    def __init__(self, rank: int, taps: Sequence[float] = (1, 1), tail: bool = False):
        super().__init__(rank, taps)
        self.tail = int(tail)

    def forward(self, x: Tensor) -> Tensor:
        if self._plain(x) and not self.tail:
            return _POOL[self.rank](x, 2)
        p, stride = len(self.taps) - 2, 1 if self.tail else 2
        before, after = (p + 1) // 2 + self.tail, p // 2 + self.tail
        if before != after:
            x, before = F.pad(x, (before, after) * self.rank), 0
        return _CONV[self.rank](x, self._weight(x), stride=stride, padding=before, groups=x.shape[1])


class Up(_Filter):
    """(B, c, *) -> (B, c, 2 *): zeros between the values, filter by the taps."""

    def __init__(self, rank: int, taps: Sequence[float] = (1, 1)):
        super().__init__(rank, taps)
        self.kernel.copy_(self.kernel.flip(tuple(range(rank))))  # a transposed convolution turns it around itself

    def forward(self, x: Tensor) -> Tensor:
        if self._plain(x):
            return F.interpolate(x, scale_factor=2, mode="nearest")
        n = len(self.taps)
        first, last = (
            (n - 2) // 2,
            (n - 1) // 2,
        )  # of the transposed convolution's result, these many are beyond the edges
        y = _UP[self.rank](x, self._weight(x, 2.0**self.rank), stride=2, padding=first, groups=x.shape[1])
        if last > first:
            for axis in range(2, x.dim()):
                y = y.narrow(axis, 0, 2 * x.shape[axis])
        return y


class ConvDown(nn.Module):
    """(B, c_in, *) -> (B, c_out, * / 2) by a strided 3x3 convolution, after the taps where given.

    Without taps, zeros are added at the far end only, as DDPM does, or at both with `centred`.
    """

    def __init__(self, rank: int, c_in: int, c_out: int, taps: Sequence[float] | None = None, *, centred: bool = False):
        super().__init__()
        self.rank, self.centred = rank, centred
        self.filter = None if taps is None else Down(rank, taps, tail=True)
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
