r"""Bits per dimension of integer data.

Layer 3. Level k of an 8-bit image stands for an interval. Uniform dequantization places it at
$x = low + (high - low)(k + u)/levels$, $u \sim U[0, 1)$, and by Jensen's inequality (Theis et al. 2016, section 3.1)

$$-\log_2 P(k) \le -E_u\left[\log_2 p(x)\right] - d \log_2\frac{high - low}{levels},$$

the second term being the Jacobian of the scaling. Dividing by d gives bits/dim.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import checks, ode
from scoresde.flow import move, take_rows
from scoresde.likelihood.divergence import Divergence
from scoresde.likelihood.log_prob import log_prob
from scoresde.model import ScoreModel, check_cond, require_model
from scoresde.modes import device_of, dtype_of
from scoresde.progress import bar
from scoresde.rng import RandomSource, derive, spawn

DEQUANTIZATIONS = ("uniform",)


@dataclass
class BitsPerDim:
    """`mean` bits/dim over the examples; `stderr` of that mean, from the scatter of the examples (it includes the trace
    and dequantization noise); `per_example` (N,), NaN where a solve did not finish; `trace_stderr` (N,) bits/dim, the
    part of each example's error that the trace estimate explains; `nfe`, mean evaluations per example; `status` (N,).
    """

    mean: float
    stderr: float
    per_example: Tensor
    trace_stderr: Tensor
    nfe: float
    status: Tensor


def dequantize(k: Tensor, levels: int, value_range: tuple[float, float], u: Tensor) -> Tensor:
    """x = low + (high - low)(k + u) / levels for integers k and u in [0, 1), in u's dtype."""
    low, high = value_range
    return low + (high - low) * (k.to(u.dtype) + u) / levels


def quantize(x: Tensor, levels: int, value_range: tuple[float, float]) -> Tensor:
    """The level 0..levels-1 (int64) whose interval holds x; values beyond the range get the outermost level."""
    low, high = value_range
    return torch.floor((x - low) / (high - low) * levels).clamp(0, levels - 1).long()


def bits_from_nats(log_prob: Tensor, d: int, levels: int, value_range: tuple[float, float]) -> Tensor:
    """Bits/dim of dequantized data from their log density in nats: the scaling's Jacobian, the sign and the units."""
    low, high = value_range
    return -(log_prob + d * math.log((high - low) / levels)) / (d * math.log(2))


def bits_per_dim(
    model: ScoreModel,
    data: Tensor | Iterable[Any],
    *,
    levels: int | None = None,
    value_range: tuple[float, float] | None = None,
    dequantization: str = "uniform",
    divergence: Divergence | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    method: str = "tsit5",
    max_nfe: int = 10_000,
    seed: int = 0,
    cond: Any = None,
    batch_size: int = 256,
    progress: bool = False,
) -> BitsPerDim:
    """Upper bound on the bits/dim of integer data 0..levels-1 under the model, by the probability-flow ODE.

    Arguments: `data`, integers (N, *), or a loader of such batches (of tuples: their first entry); `levels`, by default
    what the model was trained on, 256 for a model that does not say (refused where the data only reach below 64);
    `value_range`, where the levels lie in the model's
    space, by default the model's; `cond`, conditions for all N (tensor data only); `seed`: example i draws its noise
    from (seed, i), so results do not depend on `batch_size`. The rest as in `log_prob`.

    Raises `TypeError` for floating-point data, `ValueError` for values outside 0..levels-1 (naming minimum and
    maximum), for `levels` other than the model's or missing where they are needed, and for an empty set.
    """
    checks.choice(dequantization, DEQUANTIZATIONS, "dequantization")
    checks.positive_int(batch_size, "batch_size")
    require_model(model)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int here (example i draws from (seed, i)), got {seed!r}.")
    for name, value in (("rtol", rtol), ("atol", atol)):
        checks.positive(value, name)
    checks.positive_int(max_nfe, "max_nfe")
    checks.choice(method, ode.TABLEAUX, "Runge-Kutta method")
    if len(getattr(data, "shape", ())) > 1:
        model.check_event(tuple(data.shape[1:]))
    declared = levels is not None or model.levels is not None
    levels = _levels(model, levels)
    low, high = _range(model.value_range if value_range is None else value_range)
    device, dtype = device_of(model), dtype_of(model)
    values, errors, nfe, status, seen = [], [], [], [], 0
    total = data.shape[0] if hasattr(data, "shape") else None
    with bar(total, "bits/dim", "image", progress) as ticks:
        for k, c in _batches(data, cond, batch_size, levels):
            n, d = k.shape[0], math.prod(k.shape[1:])
            if not declared and n and int(k.max()) < levels // 4:
                raise ValueError(
                    f"levels is not given and the model does not say; 256 is the default, but the data only reach "
                    f"{int(k.max())}. Pass levels= (256 if these are dark 8-bit images)."
                )
            k, c = k.to(device), move(c, device)
            seeds = spawn(seed, n, seen)
            u = RandomSource([derive(s, 1) for s in seeds], device, n).uniform(k.shape, dtype)
            r = log_prob(
                model,
                dequantize(k, levels, (low, high), u),
                divergence=divergence,
                rtol=rtol,
                atol=atol,
                method=method,
                max_nfe=max_nfe,
                seed=[derive(s, 2) for s in seeds],
                cond=c,
            )
            values.append(bits_from_nats(r.value, d, levels, (low, high)).cpu())
            errors.append((r.stderr / (d * math.log(2))).cpu())
            nfe.append(r.nfe.cpu())
            status.append(r.status.cpu())
            seen += n
            ticks.update(n)
            ticks.set_postfix_str(f"{float(torch.cat(values).nanmean()):.3f} bits/dim")
    if not seen:
        raise ValueError("data is empty; bits/dim needs at least one example.")
    per_example, state = torch.cat(values), torch.cat(status)
    good = per_example[state == ode.OK]
    if good.numel() < seen:
        warnings.warn(
            f"{seen - good.numel()} of {seen} examples did not finish (see .status); the mean leaves them out. "
            "Raise max_nfe or loosen rtol and atol.",
            stacklevel=2,
        )
    stderr = float(good.std() / math.sqrt(good.numel())) if good.numel() > 1 else math.nan
    return BitsPerDim(
        float(good.mean()) if good.numel() else math.nan,
        stderr,
        per_example,
        torch.cat(errors),
        float(torch.cat(nfe).double().mean()),
        state,
    )


def _levels(model: ScoreModel, levels: int | None) -> int:
    if levels is None:
        return 256 if model.levels is None else model.levels
    checks.positive_int(levels, "levels")
    if model.levels is not None and levels != model.levels:
        raise ValueError(
            f"the model was made for data of {model.levels} levels, got levels={levels}; pass its own data."
        )
    return levels


def _range(value_range: Any) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in value_range)
    except (TypeError, ValueError) as e:
        raise ValueError(f"value_range must be a pair (low, high), got {value_range!r}.") from e
    if not low < high:
        raise ValueError(f"value_range must be (low, high) with low < high, got ({low}, {high}).")
    return low, high


def _batches(data: Any, cond: Any, size: int, levels: int) -> Iterator[tuple[Tensor, Any]]:
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        whole = _images(data, levels)
        check_cond(cond, whole.shape[0])
        for start in range(0, whole.shape[0], size):
            rows = torch.arange(start, min(start + size, whole.shape[0]))
            yield whole[rows], take_rows(cond, rows)
        return
    if cond is not None:
        raise ValueError("cond goes with a tensor of data; a loader would not say which rows it belongs to.")
    for batch in data:
        yield _images(batch[0] if isinstance(batch, (tuple, list)) else batch, levels), None


def _images(batch: Any, levels: int) -> Tensor:
    whole = checks.integers(batch, levels)
    if whole.dim() < 2:
        raise ValueError(f"data must have shape (N, ...), or be a loader of such batches, got {tuple(whole.shape)}.")
    return whole
