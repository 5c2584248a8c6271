r"""A model prepared for one solve: checks done, labels made and coefficients looked up once.

Layer 2. A solve calls its model at a few known times. All that depends on time alone, the coefficients of the
parameterization and the noise label, is computed before the first step, in float64, for all times at once; what is left
of an evaluation is the network and at most two tensor operations.

Every model is affine in its raw output F: $D = a\,x + b\,F$ and $\hat\epsilon = c\,x + e\,F$, with (a, b, c, e) from
`ScoreModel.affine`. A sampler whose step is linear in D or in eps_hat multiplies its coefficients with these and pays
for no conversion.

A network may write into what it is given and may return one buffer at every call. So it is given memory that nobody reads
afterwards, and an output that it may write to again is copied.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scoresde import checks, conditions
from scoresde.sde import check_monotone

_WATCHED = 2**20  # entries of labels that are laid out for a whole solve


class Row(NamedTuple):
    """What one time needs: the four coefficients, the input's scale (None for 1), and the time or label, () or (B,)."""

    a: float
    b: float
    c: float
    e: float
    scale: float | None
    label: Tensor


def denoiser_affine(sde: Any, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, c, e) for F = D: D = F and eps_hat = (x - alpha F) / sigma."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return torch.zeros_like(t), torch.ones_like(t), 1 / sigma, -alpha / sigma


class PreparedModel:
    """A `ScoreModel` prepared for the shape and the times of one solve; it stands for the model in `Sampler.step`.

    Float times take the prepared path (others than `times` are added when they come). Tensors of times, and every
    attribute that is not defined here, go to the model itself.
    """

    def __init__(self, model: Any, x: Tensor, times: Tensor, *, plain: bool = False):
        self.model = model
        self.plain = plain  # take `denoise` for the raw output, whatever `output` says
        self.sde = model.sde
        self.sigma_data = model.sigma_data
        self.batch_size, self.device = x.shape[0], x.device
        self.event_shape = tuple(x.shape[1:])
        self.rows: dict[float, Row] = {}
        self.watched = True
        self.first: Tensor | None = None  # the network's first output, to be compared with its second
        self.reuses: bool | None = None
        check_monotone(self.sde, times)
        self.add_times(times)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_times(self, times: Tensor) -> None:
        """Rows for float64 `times` (N,) on the CPU."""
        a, b, c, e = (v.tolist() for v in self.affine(times))
        points = times.tolist()
        scales, labels = self._inputs(times)
        self.rows.update(zip(points, map(Row._make, zip(a, b, c, e, scales, labels, strict=True)), strict=True))

    def _inputs(self, times: Tensor) -> tuple[list[float | None], tuple[Tensor, ...]]:
        return [None] * len(times), self._watch(times.to(self.device, copy=True))

    def _watch(self, labels: Tensor) -> tuple[Tensor, ...]:
        """The labels of each time, (N, *) -> N of (*), laid out so that writing to them shows, unless they are too many."""
        self.watched = labels.numel() <= _WATCHED and not labels.is_inference()
        return (labels.contiguous() if self.watched else labels).unbind(0)

    def _ask(self, ask: Any, given: Tensor, row: Row, cond: Any) -> Any:
        """ask(given, label[, cond]), whose label and condition are for it alone. `given` has to be, too."""
        label = row.label if self.watched else row.label.clone(memory_format=torch.contiguous_format)
        out = ask(given, label) if cond is None else ask(given, label, conditions.copy(cond))
        if self.watched and label._version:  # rows share one memory and its count of writes
            self.add_times(torch.tensor(list(self.rows), dtype=torch.float64))
        return out

    def _kept(self, out: Any, x: Tensor) -> Tensor:
        """The network's result in x's dtype, in memory that the network will not write to again."""
        result = network_result(out, x)
        if result is not out:
            return result
        # a buffer that was written to, or the end of a plain network: a copy is cheap
        if out.is_inference() or out._version:
            return out.clone()
        if self.reuses is None:
            if self.first is None:
                self.first = out
                return out.clone()
            self.reuses, self.first = same_memory(self.first, out), None
        return out.clone() if self.reuses else out

    def at(self, t: float) -> Row:
        """The row of time t."""
        row = self.rows.get(t)
        if row is None:
            self.add_times(torch.tensor([t], dtype=torch.float64))
            row = self.rows[t]
        return row

    def affine(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, c, e) at float64 times t, as `ScoreModel.affine`."""
        return denoiser_affine(self.sde, t) if self.plain else self.model.affine(t)

    def output(self, x: Tensor, t: float, cond: Any = None) -> Tensor:
        """The raw output F at x (B, *) and time t; same shape and dtype as x."""
        ask = self.model.denoise if self.plain else self.model.output
        return self._kept(self._ask(ask, x.clone(), self.at(t), cond), x)

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        if isinstance(t, Tensor):
            return network_result(self.model.denoise(x, t, cond), x)
        return self._kept(self._ask(self.model.denoise, x.clone(), self.at(t), cond), x)


class PreparedNet(PreparedModel):
    """The same for a network called as net(scale x, label[, cond]), without the model's own checks in between."""

    def __init__(self, model: Any, x: Tensor, times: Tensor, *, compile: bool = False):
        self.net = compiled(model.net, x.device) if compile else model.net
        # a captured graph writes every result into the same memory
        self.graphed = compile and x.device.type == "cuda"
        self.dtype = network_dtype(model.net, x)
        self.cast = self.dtype != x.dtype
        super().__init__(model, x, times)

    def _inputs(self, times: Tensor) -> tuple[list[float | None], tuple[Tensor, ...]]:
        scales, labels = self.model.inputs(times)
        labels = labels.to(self.device, label_dtype(self.dtype))[:, None].expand(-1, self.batch_size)
        return ([None] * len(times) if scales is None else scales.tolist()), self._watch(labels)

    def output(self, x: Tensor, t: float, cond: Any = None) -> Tensor:
        row = self.at(t)
        given = x.clone() if row.scale is None else x * row.scale
        if self.cast:
            given = given.to(self.dtype)
        if self.graphed:
            torch.compiler.cudagraph_mark_step_begin()
        out = self._ask(self.net, given, row, cond)
        return network_result(out, x).clone() if self.graphed else self._kept(out, x)

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        if isinstance(t, Tensor):
            return self.model.denoise(x, t, cond)
        row = self.at(t)
        return combine(row.a, x, row.b, self.output(x, t, cond))


_COMPILED: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def compiled(net: nn.Module, device: torch.device) -> Any:
    """`torch.compile(net)`, once per network; on CUDA with its calls captured as graphs."""
    found = _COMPILED.get(net)
    if found is None:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        found = _COMPILED[net] = torch.compile(net, mode=mode)
    return found


def combine(a: float, x: Tensor, b: float, out: Tensor) -> Tensor:
    """a x + b out, in as few operations as the numbers allow; `out` itself for (0, 1)."""
    if a == 0.0:
        return out if b == 1.0 else out * b
    return torch.mul(x, a).add_(out, alpha=b)


def network_dtype(net: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype of the network's floating-point parameters, x's for a network without any."""
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), x.dtype)


def label_dtype(dtype: torch.dtype) -> torch.dtype:
    """Noise labels stay float32 at least: bfloat16 would round 999.5 to 1000."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor_of(out: Any, x: Tensor) -> Tensor:
    """`out`, unless it is no tensor of floating-point numbers, such as x is (`TypeError`)."""
    if not isinstance(out, Tensor):
        raise TypeError(f"the network must return a tensor, got {type(out).__name__}.")
    if not out.is_floating_point():
        raise TypeError(f"the network must return floating-point numbers, got dtype {out.dtype}.")
    if out.is_meta and not x.is_meta:
        raise TypeError(f"the network must return numbers, got dtype {out.dtype} on the meta device, which holds none.")
    return out


def network_result(out: Any, x: Tensor) -> Tensor:
    """The network's result in x's dtype; errors for what is not a tensor of numbers of x's shape."""
    tensor_of(out, x)
    if out.shape != x.shape:
        checks.same_shape(out, x.shape, "the network's output")
    return out if out.dtype == x.dtype else out.to(x.dtype)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, both alive, lie in one storage."""
    try:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # inside torch.func a tensor has no memory of its own
        return False


def call_network(net: nn.Module, x: Tensor, label: Tensor, cond: Any) -> Tensor:
    """net(x, label) or net(x, label, cond) in the network's own dtype, the result back in x's dtype; label () or (B,).

    The network is given copies. Its result may be memory that it will write to again: use it up, or copy it.
    """
    dtype = network_dtype(net, x)
    inputs = [x.to(dtype, copy=True), label.to(label_dtype(dtype)).expand(x.shape[0]).clone()]
    out = net(*inputs) if cond is None else net(*inputs, conditions.copy(cond))
    return tensor_of(out, x).to(x.dtype)
