"""What the networks are told besides x: the noise level, class labels and continuous conditions. Layer 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import transforming

KINDS = ("sinusoidal", "positional", "fourier")


class NoiseEmbedding(nn.Module):
    r"""A noise label (B,) and an optional condition -> (B, width).

    Features sin and cos of the label at fixed frequencies $\omega_j$, then two linear layers with SiLU after each:

    | kind | $\omega_j$, j = 0 ... `frequencies` - 1 | for labels |
    |---|---|---|
    | sinusoidal | geometric between 0.27 and 24 rad per unit | of order 1: t, ln(sigma)/4 |
    | positional | $10000^{-j/(n-1)}$ (Vaswani et al. 2017; Ho et al. 2020) | 0 to 1000 |
    | fourier | $2\pi\,$`scale`$\,N(0, 1)$, drawn once (Tancik et al. 2020; Song et al. 2021) | of order 1: ln(sigma) |

    Conditions join the hidden layer, or with `join="output"` the second layer's result. A condition is a tensor where the
    network knows one kind: integer class labels (B,) or rows of class weights (B, classes) for `classes`, (B, cond_dim) for
    `cond_dim`; and a dict with either or both of "classes" and "features" where it knows both. No condition is the label
    `classes`, whose row is learned, and zeros for features; networks that were never trained without a class say so by
    `null_class=False` and refuse to be asked. In training each example loses all of its condition with
    probability `drop_cond`, which is what classifier-free guidance needs (Ho & Salimans 2022).
    """

    def __init__(
        self,
        width: int,
        cond_dim: int = 0,
        frequencies: int = 16,
        *,
        classes: int = 0,
        drop_cond: float = 0.0,
        kind: str = "sinusoidal",
        scale: float = 16.0,
        join: str = "hidden",
        null_class: bool = True,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown noise embedding {kind!r}; use one of {', '.join(KINDS)}.")
        if join not in ("hidden", "output"):
            raise ValueError(f"join must be 'hidden' or 'output', got {join!r}.")
        if min(width, frequencies) < 1 or min(cond_dim, classes) < 0:
            raise ValueError(
                f"width and frequencies must be at least 1, cond_dim and classes at least 0, got {width}, {frequencies}, "
                f"{cond_dim} and {classes}."
            )
        if not 0.0 <= drop_cond < 1.0:
            raise ValueError(f"drop_cond must lie in [0, 1), got {drop_cond}.")
        self.register_buffer("frequencies", _frequencies(kind, frequencies, scale))
        self.turn = 2 * math.pi if kind == "fourier" else 1.0
        self.first = nn.Linear(2 * frequencies, width)
        self.second = nn.Linear(width, width)
        if drop_cond and classes and not null_class:
            raise ValueError("drop_cond needs null_class=True: a dropped class is the label of no class.")
        self.join, self.drop_cond, self.null_class = join, drop_cond, null_class
        self.cond_dim, self.class_count = cond_dim, classes
        self.cond = nn.Linear(cond_dim, width, bias=False) if cond_dim else None
        self.classes = nn.Embedding(classes + 1, width) if classes else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseEmbedding:
        """Moves and casts, of which a cast to half precision spares the frequencies: rounded, they would lose the angles."""
        kept = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype in (torch.bfloat16, torch.float16):
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, label: Tensor, cond: Any = None) -> Tensor:
        if label.dim() != 1:
            raise ValueError(f"the noise label must have shape (B,), one number per example, got {tuple(label.shape)}.")
        label = label.to(torch.promote_types(label.dtype, torch.float32))
        angle = label[:, None] * self.frequencies.to(label.dtype)
        if self.turn != 1.0:
            angle = angle * self.turn
        h = self.first(torch.cat([angle.sin(), angle.cos()], 1).to(self.first.weight.dtype))
        if self.join == "hidden":
            h = self._add(h, cond)
        h = self.second(F.silu(h))
        if self.join == "output":
            h = self._add(h, cond)
        return F.silu(h)

    def _add(self, h: Tensor, cond: Any) -> Tensor:
        if self.cond is None and self.classes is None:
            if cond is not None:
                raise ValueError(
                    "this network was built without conditions (cond_dim=0, classes=0), but was given one."
                )
            return h
        classes, features = self._parts(cond, h.shape[0])
        dropped = None
        if self.training and self.drop_cond and cond is not None:
            dropped = torch.rand(h.shape[0], device=h.device) < self.drop_cond
        if features is not None:
            if dropped is not None:
                features = features.masked_fill(dropped[:, None], 0)
            h = h + self.cond(features.to(self.cond.weight.dtype))
        if self.classes is not None:
            h = h + self._class_rows(classes, dropped, h.shape[0])
        return h

    def _class_rows(self, classes: Tensor | None, dropped: Tensor | None, batch: int) -> Tensor:
        table = self.classes.weight
        if classes is None and not self.null_class:
            raise ValueError(f"this network needs class labels (cond=, integers below {self.class_count}).")
        if classes is None:
            return table[-1:].expand(batch, -1)
        if classes.is_floating_point():
            rows = classes.to(table.dtype) @ table[:-1]
            return rows if dropped is None else torch.where(dropped[:, None], table[-1], rows)
        if dropped is not None:
            classes = classes.masked_fill(dropped, self.class_count)
        return self.classes(classes)

    def _in_range(self, classes: Tensor) -> bool:
        return int(classes.min()) >= 0 and int(classes.max()) < self.class_count + self.null_class

    def _parts(self, cond: Any, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """(classes, features) of a condition, after checking it."""
        if isinstance(cond, dict):
            unknown = sorted(str(k) for k in cond if k not in ("classes", "features"))
            if unknown:
                raise ValueError(f"cond may have the keys 'classes' and 'features', got {', '.join(unknown)} as well.")
            classes, features = cond.get("classes"), cond.get("features")
        elif cond is not None and self.cond is not None and self.classes is not None:
            raise ValueError("this network takes classes and features: give cond=dict(classes=..., features=...).")
        else:
            classes, features = (None, cond) if self.classes is None else (cond, None)
        if (classes is not None and self.classes is None) or (features is not None and self.cond is None):
            knows = "features" if self.classes is None else "classes"
            raise ValueError(f"this network takes {knows} only; the condition has something else.")
        for value in (classes, features):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"cond must hold tensors, got {type(value).__name__}; convert it with torch.as_tensor.")
        if features is not None and tuple(features.shape) != (batch, self.cond_dim):
            raise ValueError(
                f"cond must have shape ({batch}, {self.cond_dim}) for this network, got {tuple(features.shape)}."
            )
        if classes is not None:
            wanted = (batch, self.class_count) if classes.is_floating_point() else (batch,)
            whole = classes.dtype in (torch.int64, torch.int32)
            # elsewhere than on a CPU a look at the values would stall the device at every evaluation
            looked = whole and classes.device.type == "cpu" and classes.numel() and not torch.compiler.is_compiling()
            inside = not looked or transforming() or self._in_range(classes)
            if tuple(classes.shape) != wanted or not (whole or classes.is_floating_point()) or not inside:
                raise ValueError(
                    f"class labels must be integers of shape ({batch},) from 0 to {self.class_count} (the last for no "
                    f"class), or weights of shape ({batch}, {self.class_count}); got {classes.dtype} of shape "
                    f"{tuple(classes.shape)}{'' if inside else f' from {int(classes.min())} to {int(classes.max())}'}."
                )
        return classes, features


def _frequencies(kind: str, count: int, scale: float) -> Tensor:
    if kind == "sinusoidal":
        return torch.exp(torch.linspace(-1.3, 3.2, count))
    if kind == "positional":
        return torch.exp(torch.arange(count, dtype=torch.float32) * -(math.log(10000) / max(count - 1, 1)))
    return torch.randn(count) * scale
