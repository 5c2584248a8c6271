"""What a network is told besides x and the noise level: the one place that takes its conditions. Layer 0.

A network reads its condition by `Conditions.read`, hands the parts to its `ConditionalEmbedding`, and puts the spatial ones
beside x. Layers that attend to tokens find them, and their mask, in the parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.nets.blocks import transforming
from scoresde.nets.embedding import NoiseEmbedding, geometric_frequencies, waves

KINDS = ("classes", "features", "numbers", "tokens", "pooled", "spatial")
NUMBER_FREQUENCIES = 64


class ConditionParts(NamedTuple):
    """A condition as layers read it: checked, and in training dropped. What is missing is None.

    classes: integers (B,), the number of classes for none, or weights (B, classes + 1), the last of them for none.
    features, pooled: (B, n), zeros where dropped.
    numbers: (B, 2 n NUMBER_FREQUENCIES), their sines and cosines, zeros where dropped.
    tokens, mask: (B, L, n), and (B, L) booleans, False where padded or dropped; or None where all count.
    spatial: (B, n, *), zeros where dropped or missing.
    """

    classes: Tensor | None = None
    features: Tensor | None = None
    numbers: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    spatial: Tensor | None = None

    def beside(self, x: Tensor) -> Tensor:
        """x (B, c, *) with the spatial condition as further channels."""
        return x if self.spatial is None else torch.cat([x, self.spatial.to(x.dtype)], 1)


@dataclasses.dataclass
class Conditions:
    """The conditions that a network takes: how many classes, and how many values of each other kind; 0 for none.

    | kind | `cond[kind]` | how it reaches the network |
    |---|---|---|
    | classes | integers (B,), or weights of the classes (B, classes) | a learned row, or a mixture of rows; none is a row too |
    | features | (B, features) | a linear map |
    | numbers | (B, numbers), such as sizes and crops in pixels | a linear map of their sines and cosines |
    | tokens | (B, L, tokens), and "mask" (B, L), True where one counts | a linear map of the mean of those that count |
    | pooled | (B, pooled) | a linear map |
    | spatial | (B, spatial, *) with the spatial axes of x | channels beside those of x |

    All kinds but the last are added to the noise embedding. `cond` is a dict with any of the kinds, or the tensor itself for a
    network with one kind only. What is missing contributes zeros, but for the class, of which none is a row too.

    drop: in training each example loses all of its condition with this probability, which is what classifier-free guidance
        needs (Ho & Salimans 2022); or a dict of probabilities by kind, with which it loses that kind, and "all", with which it
        loses all. Drawn from torch's global generator, as dropout is.
    null_class: whether there is a label of no class. Networks that were never trained with one refuse to be asked.

    Raises `ValueError` for options out of range or at odds with each other.
    """

    classes: int = 0
    features: int = 0
    numbers: int = 0
    tokens: int = 0
    pooled: int = 0
    spatial: int = 0
    drop: float | Mapping[str, float] = 0.0
    null_class: bool = True

    def __post_init__(self) -> None:
        for kind in KINDS:
            if getattr(self, kind) < 0:
                raise ValueError(f"{_OPTIONS.get(kind, kind)} must be at least 0, got {getattr(self, kind)}.")
        if isinstance(self.drop, Mapping):
            self.drop = dict(self.drop)
        self.kinds = tuple(kind for kind in KINDS if getattr(self, kind))
        foreign = sorted(self._rates.keys() - {"all", *self.kinds})
        if foreign:
            raise ValueError(
                f"drop_cond may name {', '.join(('all', *self.kinds))} in this network, got {', '.join(foreign)}."
            )
        if not all(0.0 <= p < 1.0 for p in self._rates.values()):
            raise ValueError(f"drop_cond must lie in [0, 1), got {self.drop}.")
        if self.classes and not self.null_class and (self._rates.get("all") or self._rates.get("classes")):
            raise ValueError("drop_cond needs null_class=True: a dropped class is the label of no class.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Conditions:
        """From the options of a network, of which `cond_dim` counts the features and `drop_cond` says what to drop."""
        wanted = {f.name: _OPTIONS.get(f.name, f.name) for f in dataclasses.fields(cls)}
        return cls(**{own: options[name] for own, name in wanted.items() if name in options})

    @property
    def _rates(self) -> Mapping[str, float]:
        return self.drop if isinstance(self.drop, Mapping) else {"all": self.drop}

    def read(self, cond: Any, x: Tensor, training: bool = False) -> ConditionParts:
        """A condition, for examples x (B, *), as what the layers read.

        `cond` is None, a dict with any of the kinds of this network, or the tensor itself where it takes one kind only.
        Raises `ValueError` and `TypeError`, with what was given and what is wanted, for a condition that does not fit.
        """
        if not self.kinds:
            if cond is not None:
                raise ValueError(
                    "this network was built without conditions (cond_dim=0, classes=0), but was given one."
                )
            return _NOTHING
        found = self._by_kind(cond)
        self._check(found, x)
        if self.classes and "classes" not in found and not self.null_class:
            raise ValueError(f"this network needs class labels (cond=, integers below {self.classes}).")
        if "numbers" in found:
            found["numbers"] = _number_waves(found["numbers"])
        if "classes" in found and found["classes"].is_floating_point():
            found["classes"] = F.pad(found["classes"], (0, 1))
        if training and cond is not None:
            self._drop(found, x)
        if self.spatial and "spatial" not in found:
            found["spatial"] = x.new_zeros(x.shape[0], self.spatial, *x.shape[2:])
        return ConditionParts(**found)

    def _by_kind(self, cond: Any) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        if cond is None:
            return {}
        if not isinstance(cond, Mapping):
            if len(self.kinds) > 1:
                wanted = ", ".join(f"{kind}=..." for kind in self.kinds)
                raise ValueError(f"this network takes {_listed(self.kinds)}: give cond=dict({wanted}).")
            cond = {self.kinds[0]: cond}
        keys = (*self.kinds, "mask") if self.tokens else self.kinds
        unknown = sorted(str(k) for k in cond if k not in (*KINDS, "mask"))
        if unknown:
            quoted = _listed([repr(k) for k in keys])
            raise ValueError(f"cond may have the keys {quoted}, got {', '.join(unknown)} as well.")
        found = {kind: value for kind, value in cond.items() if value is not None}
        others = [kind for kind in found if kind not in keys]
        if others:
            raise ValueError(
                f"this network takes {_listed(self.kinds)} only; the condition has something else: {', '.join(others)}."
            )
        for kind, value in found.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"cond must hold tensors, got {type(value).__name__}; convert it with torch.as_tensor.")
            if value.is_complex():
                raise TypeError(f"cond must hold real numbers, got {value.dtype} for {kind}.")
        return found

    def _check(self, found: Mapping[str, Tensor], x: Tensor) -> None:
        batch = x.shape[0]
        for kind, value in found.items():
            if kind == "classes":
                self._check_classes(value, batch)
                continue
            length = value.shape[1] if value.dim() > 1 else 1
            wanted: tuple[int, ...]
            if kind == "mask":
                wanted = (batch, found["tokens"].shape[1] if "tokens" in found else length)
            elif kind == "tokens":
                wanted = (batch, length, self.tokens)
            else:
                wanted = (batch, getattr(self, kind), *(x.shape[2:] if kind == "spatial" else ()))
            if tuple(value.shape) != wanted:
                raise ValueError(f"cond must have shape {wanted} for the {kind}, got {tuple(value.shape)}.")
        if "mask" in found and "tokens" not in found:
            raise ValueError("cond has a mask but no tokens; give both.")
        if "mask" in found and found["mask"].dtype != torch.bool:
            raise TypeError(
                f"the mask of tokens must hold booleans, got {found['mask'].dtype}; convert it with .bool()."
            )

    def _check_classes(self, classes: Tensor, batch: int) -> None:
        wanted = (batch, self.classes) if classes.is_floating_point() else (batch,)
        whole = classes.dtype in (torch.int64, torch.int32)
        # elsewhere than on a CPU a look at the values would stall the device at every evaluation
        looked = whole and classes.device.type == "cpu" and classes.numel() and not torch.compiler.is_compiling()
        inside = not looked or transforming() or self._in_range(classes)
        if tuple(classes.shape) != wanted or not (whole or classes.is_floating_point()) or not inside:
            raise ValueError(
                f"class labels must be integers of shape ({batch},) from 0 to {self.classes} (the last for no "
                f"class), or weights of shape ({batch}, {self.classes}); got {classes.dtype} of shape "
                f"{tuple(classes.shape)}{'' if inside else f' from {int(classes.min())} to {int(classes.max())}'}."
            )

    def _in_range(self, classes: Tensor) -> bool:
        return int(classes.min()) >= 0 and int(classes.max()) < self.classes + self.null_class

    def _drop(self, found: dict[str, Tensor], x: Tensor) -> None:
        """Take from each example what it loses, in place of `found`'s entries."""
        rates = self._rates
        lost = {k: torch.rand(len(x), device=x.device) < rates[k] for k in ("all", *self.kinds) if rates.get(k)}
        for kind in self.kinds:
            rows = _either(lost.get("all"), lost.get(kind))
            if kind not in found or rows is None:
                continue
            value = found[kind]
            if kind == "tokens":
                mask = found.get("mask")
                found["mask"] = (value.new_ones(value.shape[:2], dtype=torch.bool) if mask is None else mask) & ~rows[
                    :, None
                ]
            elif kind != "classes":
                found[kind] = value.masked_fill(rows.reshape(-1, *(1,) * (value.dim() - 1)), 0)
            elif value.is_floating_point():
                found[kind] = torch.cat([value[:, :-1].masked_fill(rows[:, None], 0), rows[:, None].to(value.dtype)], 1)
            else:
                found[kind] = value.masked_fill(rows, self.classes)


class ConditionalEmbedding(NoiseEmbedding):
    """A noise label (B,) and the parts of a condition -> (B, width): `NoiseEmbedding`, to which the condition is added.

    It joins the hidden layer, or with `join="output"` the second layer's result, as the sum of the kinds' contributions (see
    `Conditions`). Tokens contribute the linear map of their mean over the mask; layers that attend to them read
    `tokens` and `mask` of the parts themselves.
    """

    def __init__(
        self,
        width: int,
        conditions: Conditions,
        frequencies: int = 16,
        *,
        kind: str = "sinusoidal",
        scale: float = 16.0,
        join: str = "hidden",
    ):
        super().__init__(width, frequencies, kind=kind, scale=scale)
        if join not in ("hidden", "output"):
            raise ValueError(f"join must be 'hidden' or 'output', got {join!r}.")
        self.join = join

        def linear(channels: int) -> nn.Linear | None:
            return nn.Linear(channels, width, bias=False) if channels else None

        self.cond = linear(conditions.features)
        self.classes = nn.Embedding(conditions.classes + 1, width) if conditions.classes else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)
        self.numbers = linear(2 * NUMBER_FREQUENCIES * conditions.numbers)
        self.tokens = linear(conditions.tokens)
        self.pooled = linear(conditions.pooled)

    def forward(self, label: Tensor, parts: ConditionParts | None = None) -> Tensor:
        added = self._sum(_NOTHING if parts is None else parts, label.shape[0])
        return self._embed(label, added, None) if self.join == "hidden" else self._embed(label, None, added)

    def _sum(self, parts: ConditionParts, batch: int) -> Tensor | None:
        tokens = None if parts.tokens is None else mean_over_tokens(parts.tokens, parts.mask)
        given = (
            (self.cond, parts.features),
            (self.numbers, parts.numbers),
            (self.tokens, tokens),
            (self.pooled, parts.pooled),
        )
        found = [layer(v.to(layer.weight.dtype)) for layer, v in given if layer is not None and v is not None]
        if self.classes is not None:
            found.append(_class_rows(self.classes, parts.classes, batch))
        return sum(found[1:], found[0]) if found else None


_NOTHING = ConditionParts()
_OPTIONS = {"features": "cond_dim", "drop": "drop_cond"}


def _class_rows(table: nn.Embedding, classes: Tensor | None, batch: int) -> Tensor:
    """(B, width): rows of the table for labels, mixtures of them for weights, the last row for none."""
    if classes is None:
        return table.weight[-1:].expand(batch, -1)
    return classes.to(table.weight.dtype) @ table.weight if classes.is_floating_point() else table(classes)


def mean_over_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, n) -> (B, n): the mean of the tokens that count, whatever the others hold; zeros where none does."""
    if mask is None:
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    total = tokens.masked_fill(~mask[:, :, None], 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


def _number_waves(values: Tensor) -> Tensor:
    """(B, k) -> (B, 2 k NUMBER_FREQUENCIES), in float32 at least: a low precision would lose the angles."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    omega = geometric_frequencies(NUMBER_FREQUENCIES, values.device).to(values.dtype)
    return waves((values[:, :, None] * omega).flatten(1))


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a | b


def _listed(words: Sequence[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])
