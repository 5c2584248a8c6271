"""The RefineNet of NCSN and NCSNv2 (Song & Ermon 2019, 2020), for images. Layer 0."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import check_input, spread, through
from scoresde.nets.options import LIMITS, arguments, choices
from scoresde.nets.resample import crop, pad_to_multiple

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": functools.partial(F.leaky_relu, negative_slope=0.2),
    "swish": F.silu,
}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": functools.partial(F.max_pool2d, kernel_size=5, stride=1, padding=2),
    "mean": functools.partial(F.avg_pool2d, kernel_size=5, stride=1, padding=2),  # zeros beyond the edge count
}


class InstanceNormPlus(nn.Module):
    """Instance norm that keeps a trace of the means it removes: (B, c, h, w) and rows (B,) or None -> (B, c, h, w).

    gamma (normed x + alpha m) + beta, where m are the channel means of x, standardized over the channels. A row of `table`
    holds gamma, alpha and beta, (3 c,): one for all, or one for each of `steps` noise levels.
    """

    def __init__(self, channels: int, steps: int = 0):
        super().__init__()
        rows = max(steps, 1)
        near_one = 1 + 0.02 * torch.randn(rows, 2 * channels)
        self.table = nn.Parameter(torch.cat([near_one, torch.zeros(rows, channels)], 1))

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        gamma, alpha, beta = (self.table if index is None else self.table[index]).chunk(3, 1)
        means = x.mean((2, 3))
        variance, centre = torch.var_mean(means, 1, keepdim=True)  # the sum over c - 1, as in training
        means = (means - centre) * torch.rsqrt(variance + 1e-5)
        normed = F.group_norm(x, x.shape[1], eps=1e-5)  # a group for each channel is instance norm
        return torch.addcmul(spread(gamma * alpha * means + beta, x), spread(gamma, x), normed)


class Layer(nn.Module):
    """Norm and `between`, either of them or none, then a convolution that keeps the size."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        norm: Callable[[int], nn.Module] | None,
        between: Callable[[Tensor], Tensor] | None = None,
        *,
        dilation: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        self.norm = None if norm is None else norm(c_in)
        self.between = between
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation, bias=bias)

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        if self.norm is not None:
            x = self.norm(x, index)
        return self.conv(x if self.between is None else self.between(x))


class Residual(nn.Module):
    """Two layers beside a skip connection.

    Where it `enters` a stage there is a convolution in the skip, and the resolution is halved, unless the convolutions are
    dilated instead.
    """

    def __init__(self, c_in: int, c_out: int, layer: Callable[..., Layer], *, dilation: int = 1, enters: bool = False):
        super().__init__()
        self.first = layer(c_in, c_in, dilation=dilation)
        self.second = layer(c_in, c_out, dilation=dilation)
        self.halves = enters and dilation == 1
        self.skip: nn.Module | None = None
        if self.halves:
            self.skip = nn.Conv2d(c_in, c_out, 1)
        elif enters:
            self.skip = nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        h = self.second(self.first(x, index), index)
        if self.halves:  # the mean before the 1x1 convolution is the mean after it
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + (x if self.skip is None else self.skip(x))


class Refine(nn.Module):
    """A stage's features and those of the coarser stages (none at the coarsest), into features for the next finer one.

    Residual units on either, their sum at the finer resolution, a chain of pooled convolutions, `units` residual units.
    """

    def __init__(
        self,
        widths: Sequence[int],
        c_out: int,
        units: int,
        norm: Callable[[int], nn.Module] | None,
        act: Callable[[Tensor], Tensor],
        pool: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        layer = functools.partial(Layer, norm=norm, between=act, bias=False)
        self.adapt = nn.ModuleList(nn.ModuleList(Residual(c, c, layer) for _ in range(2)) for c in widths)
        self.join = nn.ModuleList(Layer(c, c_out, norm) for c in widths) if len(widths) > 1 else None
        self.chain = nn.ModuleList(Layer(c_out, c_out, norm, pool, bias=False) for _ in range(2))
        self.units = nn.ModuleList(Residual(c_out, c_out, layer) for _ in range(units))
        self.act = act

    def forward(self, inputs: Sequence[Tensor], index: Tensor | None) -> Tensor:
        adapted = [through(units, x, index) for units, x in zip(self.adapt, inputs, strict=True)]
        h = adapted[0]
        if self.join is not None:
            near, far = (layer(x, index) for layer, x in zip(self.join, adapted, strict=True))
            if far.shape != near.shape:
                far = F.interpolate(far, size=near.shape[2:], mode="bilinear", align_corners=True)
            h = near + far
        h = path = self.act(h)
        for layer in self.chain:
            path = layer(path, index)
            h = h + path
        return through(self.units, h, index)


class RefineNet(nn.Module):
    """Dilated residual network with refinements back up: `forward(x, label, cond=None)`, (B, c, h, w) -> the same shape.

    The result is the network's own, before any division by sigma: the score itself in NCSN, sigma times the score in NCSNv2.
    The label (B,) is the number of a noise level, rounded to one, where there are `steps`; otherwise it is not looked at. There
    are no conditions. Sizes other than `size` work too, if their axes can be halved as often.

    | original | multipliers | dilations | pool | steps |
    |---|---|---|---|---|
    | ncsn | 1, 2, 2, 2 | 1, 1, 2, 4 | mean | levels |
    | ncsnv2_64 | 1, 2, 2, 2 | 1, 1, 2, 4 | max | 0 |
    | ncsnv2_128 | 1, 2, 2, 4, 4 | 1, 1, 1, 2, 4 | max | 0 |
    | ncsnv2_256 | 1, 2, 2, 2, 4, 4 | 1, 1, 1, 1, 2, 4 | max | 0 |

    Arguments:
        in_channels: of the data, in and out.
        size: spatial shape, two axes.
        width, multipliers: channels of stage i are width * multipliers[i], finest first; the last two stages have the same.
        dilations: of the convolutions in each stage. A stage with 1 halves the resolution (not the first), others keep it.
        activation: "elu", "relu", "lrelu" (slope 0.2) or "swish".
        pool: "max" or "mean", over 5 x 5 pixels, in the refinements.
        steps: noise levels, each with norms of its own; 0 for a network that is not told the level.
        rescale_input: the data lie in [0, 1] and the network sees 2 x - 1.
        pad: surround x by zeros up to the next size that can be halved as often, and crop the result.

    Raises `ValueError` for options that do not fit each other or the size.
    """

    def __init__(
        self,
        in_channels: int,
        size: Sequence[int],
        *,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 2, 4),
        activation: str = "elu",
        pool: str = "max",
        steps: int = 0,
        rescale_input: bool = False,
        pad: bool = False,
    ):
        given = arguments(locals())
        super().__init__()
        self.config = given
        _check(**given)
        size, multipliers, dilations = given["size"], given["multipliers"], given["dilations"]
        self.steps, self.rescale_input, self.pad = steps, rescale_input, pad
        self.factor = 2 ** sum(d == 1 for d in dilations[1:])
        self._check_size(size)
        widths = [width * m for m in multipliers]
        act, norm = ACTIVATIONS[activation], functools.partial(InstanceNormPlus, steps=steps)
        layer = functools.partial(Layer, norm=norm, between=act)

        self.enter = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c, dilation) in enumerate(zip(widths, dilations, strict=True)):
            first = Residual(widths[max(i - 1, 0)], c, layer, dilation=dilation, enters=i > 0)
            self.down.append(nn.ModuleList([first, Residual(c, c, layer, dilation=dilation)]))
        self.up = nn.ModuleList()
        above: list[int] = []
        for i in reversed(range(len(widths))):
            c_out = widths[max(i - 1, 0)]
            # the refinements are normed only where the norms tell the noise level
            refine = Refine([widths[i], *above], c_out, 1 if i else 3, norm if steps else None, act, POOLS[pool])
            self.up.append(refine)
            above = [c_out]
        self.leave = Layer(widths[0], in_channels, norm, act)

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        if cond is not None:
            raise ValueError("this network takes no condition, but was given one.")
        check_input(x, label, 2, self.config["in_channels"])
        self._check_size(x.shape[2:])
        # clamped, since a row that is not there would be an error that a GPU reports late and never recovers from
        index = label.round().long().clamp(0, self.steps - 1) if self.steps else None
        size = x.shape[2:]
        x = pad_to_multiple(2 * x - 1 if self.rescale_input else x, (self.factor,) * 2)
        h = self.enter(x)
        kept: list[Tensor] = []
        for stage in self.down:
            h = through(stage, h, index)
            kept.append(h)
        h = self.up[0]([kept.pop()], index)
        for refine in self.up[1:]:
            h = refine([kept.pop(), h], index)
        return crop(self.leave(h, index), size)

    def _check_size(self, size: Sequence[int]) -> None:
        uneven = not self.pad and any(n % self.factor for n in size)
        if len(size) != 2 or uneven or any(n + -n % self.factor < 2 * self.factor for n in size):
            raise ValueError(
                f"this network halves images {self.factor.bit_length() - 1} times: it needs two spatial axes that are "
                f"multiples of {self.factor} (or pad=True), {2 * self.factor} at least; got {tuple(size)}."
            )


def _check(width: int, multipliers: Sequence[int], dilations: Sequence[int], **given: Any) -> None:
    choices(given, activation=tuple(ACTIVATIONS), pool=tuple(POOLS))
    if len(multipliers) < 2 or len(multipliers) != len(dilations):
        raise ValueError(
            f"multipliers and dilations must have one entry for each of two stages or more, got {multipliers} and "
            f"{dilations}."
        )
    if multipliers[-1] != multipliers[-2]:  # the coarsest refinement has no layer that could change the channels
        raise ValueError(f"the last two multipliers must be equal, got {multipliers}.")
    if width * min(multipliers) < 2:
        raise ValueError(f"every stage needs two channels at least, got width={width}, multipliers={multipliers}.")
    if width * max(multipliers) > LIMITS["width"][1]:
        raise ValueError(
            f"width={width}, multipliers={multipliers}: a stage has at most {LIMITS['width'][1]} channels."
        )
