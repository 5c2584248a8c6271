r"""Bits per dimension of integer data.

Layer 3. Level k of an 8-bit image stands for an interval. A dequantizer draws a point x of it from a density q(x|k), and by
Jensen's inequality (Theis et al. 2016, section 3.1; with K > 1 samples Burda et al. 2016)

$$-\log_2 P(k) \le -E\left[\log_2 \frac1K \sum_{j=1}^{K} \frac{p(x_j)}{q(x_j|k)}\right].$$

Uniformly, $x = low + (high - low)(k + u)/levels$ with $u \sim U[0, 1)$, and $-\log q$ is $d \log((high - low)/levels)$, the
Jacobian of the scaling. Dividing by d gives bits/dim.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import checks, conditions, ode
from scoresde.likelihood.decoupled.quadrature import LikelihoodPlan
from scoresde.likelihood.decoupled.survey import plan_likelihood
from scoresde.likelihood.density import METHODS, log_prob
from scoresde.likelihood.dequantization import (
    Dequantizer,
    check_levels,
    check_reach,
    dequantizer,
    levels_of,
    log_mean_weight,
    pair,
)
from scoresde.likelihood.divergence import Divergence, Exact, check_divergence, default_divergence
from scoresde.models.base import ScoreModel, require_model
from scoresde.modes import device_of, dtype_of
from scoresde.progress import bar
from scoresde.rng import RandomSource, derive, spawn

LOADER, IGNORE = "loader", "ignore"  # what `cond` may say of the second entry of a loader's batches


@dataclass
class BitsPerDim:
    """`mean` bits/dim over the examples; `stderr` of that mean, from the scatter of the examples (it includes the trace
    and dequantization noise); `per_example` (N,), NaN where a solve did not finish; `trace_stderr` (N,) bits/dim, the
    part of each example's error that the trace estimate explains; `nfe`, mean evaluations per example; `status` (N,).

    `per_draw` (N, draws), the bound from each dequantization draw, of which `per_example` is the mean; `draw_stderr`, the
    part of the error of `mean` that comes from the draws (and probes) alone, which more draws would reduce: NaN for one draw;
    `nfe_per_example` (N,).
    """

    mean: float
    stderr: float
    per_example: Tensor
    trace_stderr: Tensor
    nfe: float
    status: Tensor
    draw_stderr: float = math.nan
    per_draw: Tensor | None = None
    nfe_per_example: Tensor | None = None


def bits_from_nats(log_prob: Tensor, d: int, levels: int, value_range: tuple[float, float]) -> Tensor:
    """Bits/dim of dequantized data from their log density in nats: the scaling's Jacobian, the sign and the units."""
    checks.positive_int(d, "d")
    low, high = pair(value_range)
    return -(log_prob + d * math.log((high - low) / check_levels(levels))) / (d * math.log(2))


def bits_per_dim(
    model: ScoreModel,
    data: Tensor | Iterable[Any],
    *,
    levels: int | None = None,
    value_range: tuple[float, float] | None = None,
    dequantization: str | Dequantizer = "uniform",
    samples: int = 1,
    draws: int = 1,
    divergence: Divergence | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    method: str = "decoupled",
    plan: LikelihoodPlan | str | None = "auto",
    max_nfe: int = 10_000,
    seed: int = 0,
    first: int = 0,
    cond: Any = None,
    batch_size: int = 256,
    progress: bool = False,
) -> BitsPerDim:
    """Upper bound on the bits/dim of integer data 0..levels-1 under the model, by the probability-flow ODE.

    Arguments: `data`, integers (N, *), or a loader of such batches; `levels`, by default what the model was trained on, 256 for a
    model that does not say (refused where the data only reach below 64); `value_range`, where the levels lie in the model's
    space, by default the model's; `seed`: example i draws its noise from (seed, first + i), so results do not depend on
    `batch_size` (but for a network's own rounding, see `log_prob`); `first`: where data[0] stands in a larger set that is scored
    in parts; `plan`: where a decoupled solve looks, by default `plan_likelihood(model)` on eight of the model's own samples where
    the trace is estimated and there is no condition (None: what `log_prob` takes by itself). The rest as in `log_prob`.

    `cond`, the condition for all N. A loader of (data, condition) needs to be told what the second entry is for: "loader", it is
    the condition, or "ignore", the data are scored without it; `ValueError` otherwise.

    `dequantization`: "uniform", for models of dequantized images; "truncated-normal", for models of the levels' centres; or
    an object with `draw(data, source)`, such as a fitted `VariationalDequantizer`. `samples`: points per bound, combined by
    importance weighting, which tightens the bound as it grows. `draws`: independent bounds per example, averaged. An example
    takes samples times draws solves. The points of one bound share their probes, so that the error of an estimated trace does
    not enter through the logarithm; what is left of it is of second order, and `divergence=Exact()` removes it.

    Raises `TypeError` for floating-point data, `ValueError` for values outside 0..levels-1 (naming minimum and
    maximum), for `levels` other than the model's or missing where they are needed, for a dequantizer made for others, and for
    an empty set.
    """
    options: dict[str, Any] = dict(divergence=divergence, rtol=rtol, atol=atol, method=method, max_nfe=max_nfe)
    _check_options(model, seed, first, plan, **options, batch_size=batch_size, samples=samples, draws=draws)
    shape = getattr(data, "shape", ())
    if len(shape) > 1:
        model.check_event(tuple(shape[1:]))
    count = levels_of(model, levels)
    ends = pair(model.value_range if value_range is None else value_range)
    points = dequantizer(dequantization, model, count, ends)
    unconditional = cond is None or (isinstance(cond, str) and cond == IGNORE)
    if plan != "auto":
        options["plan"] = plan
    elif unconditional and surveyed(model, divergence, method):
        options["plan"] = survey_of(model, divergence=divergence, rtol=rtol, atol=atol)
    device = device_of(model)
    values, errors, nfe, status, seen = [], [], [], [], 0
    total = data.shape[0] if hasattr(data, "shape") else None
    with bar(total, "bits/dim", "image", progress) as ticks:
        for k, c in _batches(data, cond, batch_size, count):
            n, d = k.shape[0], math.prod(k.shape[1:])
            check_reach(k, model, levels)
            k, c = k.to(device), conditions.move(c, device)
            log_w, error, cost, state = _log_weights(
                model, k, c, points, (draws, samples), spawn(seed, n, first + seen), batch_size, options
            )
            values.append((-log_mean_weight(log_w.transpose(0, 1)) / (d * math.log(2))).T.cpu())
            errors.append((error / (d * math.log(2))).cpu())
            nfe.append(cost.cpu())
            status.append(state.cpu())
            seen += n
            ticks.update(n)
            ticks.set_postfix_str(estimate_text(torch.cat(values).mean(1)))
    if not seen:
        raise ValueError("data is empty; bits/dim needs at least one example.")
    return summarize(torch.cat(values), torch.cat(errors), torch.cat(nfe), torch.cat(status))


def surveyed(model: ScoreModel, divergence: Divergence | None, method: str) -> bool:
    """Whether the default is to survey the model: its traces are estimated along a trajectory, and it can draw examples."""
    if method != "decoupled" or model.event_shape is None:
        return False
    chosen = default_divergence(math.prod(model.event_shape)) if divergence is None else divergence
    return not isinstance(chosen, Exact)


def survey_of(model: ScoreModel, **options: Any) -> LikelihoodPlan | None:
    """`plan_likelihood` of the model's own examples; None, with a warning, where it cannot draw any."""
    try:
        return plan_likelihood(model, **options)
    except RuntimeError as e:
        warnings.warn(f"no survey of the model, the default plan is taken ({str(e).splitlines()[0]}).", stacklevel=3)
        return None


def summarize(per_draw: Tensor, trace_stderr: Tensor, nfe: Tensor, status: Tensor) -> BitsPerDim:
    """The result over N >= 1 examples from what was found for each: bounds (N, draws) and the trace's standard errors (N,) in
    bits/dim, evaluations (N,) and status (N,). Warns where some did not finish."""
    per_example = per_draw.mean(1) if per_draw.shape[1] > 1 else per_draw[:, 0]
    good = status == ode.OK
    unfinished = int((~good).sum())
    if unfinished:
        warnings.warn(
            f"{unfinished} of {len(status)} examples did not finish (see .status); the mean leaves them out. "
            'Raise max_nfe, loosen rtol and atol, or try method="tsit5".',
            stacklevel=3,
        )
    return BitsPerDim(
        *mean_and_stderr(per_example[good]),
        per_example,
        trace_stderr,
        float(nfe.double().mean()),
        status,
        _draw_stderr(per_draw[good]),
        per_draw,
        nfe,
    )


def mean_and_stderr(values: Tensor) -> tuple[float, float]:
    """Mean of `values` (N,) and its standard error from their scatter; NaN for the mean of none and the error of one."""
    n = values.numel()
    mean = float(values.mean()) if n else math.nan
    return mean, float(values.std() / math.sqrt(n)) if n > 1 else math.nan


def estimate_text(per_example: Tensor) -> str:
    """The running estimate for people: mean +- standard error over the examples (N,) that finished, in bits/dim."""
    mean, stderr = mean_and_stderr(per_example[~per_example.isnan()])
    return f"{mean:.3f} +- {stderr:.3f} bits/dim"


def _log_weights(
    model: ScoreModel,
    k: Tensor,
    cond: Any,
    points: Dequantizer,
    counts: tuple[int, int],
    seeds: list[int],
    batch_size: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(v) - log q(v|k) for all draws and samples of k (n, *): (draws, samples, n), nats; with it, per example (n,),
    the trace's standard error, evaluations and the worst status. Row i draws from seeds[i]; as many copies of the batch
    go into one solve as `batch_size` allows."""
    (draws, samples), n = counts, k.shape[0]
    source = RandomSource([derive(s, 1) for s in seeds], k.device, n)
    total, together = draws * samples, max(1, batch_size // max(n, 1))
    log_w: list[Tensor] = []
    errors: list[Tensor] = []
    nfe: list[Tensor] = []
    status: list[Tensor] = []
    for start in range(0, total, together):
        copies = range(start, min(start + together, total))
        drawn = [_checked(*points.draw(k, source), k) for _ in copies]
        rows = torch.arange(n, device=k.device).repeat(len(copies))
        probes = [derive(s, 2, *([j // samples] if j >= samples else [])) for j in copies for s in seeds]
        r = log_prob(
            model,
            torch.cat([v for v, _ in drawn]).to(dtype_of(model)),
            seed=probes,
            cond=cond if len(copies) == 1 else conditions.take_rows(cond, rows),
            **options,
        )
        value = torch.where(r.status == ode.OK, r.value, torch.nan)
        log_w.append((value - torch.cat([q for _, q in drawn])).reshape(-1, n))
        for found, of in ((errors, r.stderr), (nfe, r.nfe), (status, r.status)):
            found.append(of.reshape(-1, n))
    weights = torch.cat(log_w).reshape(draws, samples, n)
    error = torch.cat(errors).reshape(draws, samples, n)
    # the points of a bound share their probes, so their errors add up as they stand; those of the draws are independent
    error = (torch.softmax(weights, 1) * error).sum(1) if samples > 1 else error[:, 0]
    error = error.square().sum(0).sqrt() / draws if draws > 1 else error[0]
    return weights, error, torch.cat(nfe).sum(0), torch.cat(status).amax(0)


def _checked(v: Tensor, log_q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    checks.same_shape(v, k.shape, "the points that the dequantizer drew")
    checks.same_shape(log_q, (k.shape[0],), "the dequantizer's log density")
    return v.detach(), log_q.detach().double()


def _draw_stderr(per_draw: Tensor) -> float:
    """Standard error of the mean over examples that the scatter of each example's draws (N, draws) explains."""
    n, draws = per_draw.shape
    if draws < 2 or n == 0:
        return math.nan
    return float((per_draw.var(1).sum() / draws).sqrt() / n)


def _check_options(
    model: Any,
    seed: Any,
    first: Any,
    plan: Any,
    *,
    divergence: Any,
    rtol: Any,
    atol: Any,
    method: Any,
    **counts: Any,
) -> None:
    """The checks of `bits_per_dim` that do not look at the data."""
    require_model(model)
    for name, value in counts.items():
        checks.positive_int(value, name)
    for name, value in (("rtol", rtol), ("atol", atol)):
        checks.positive(value, name)
    checks.choice(method, METHODS, "method of solution")
    check_divergence(divergence)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int here (example i draws from (seed, i)), got {seed!r}.")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"first must be an int >= 0, the index of data[0] in the whole set, got {first!r}.")
    if plan is not None and not (isinstance(plan, LikelihoodPlan) or (isinstance(plan, str) and plan == "auto")):
        raise TypeError(
            f'plan must be "auto", None or a LikelihoodPlan, such as plan_likelihood(model) returns, got {plan!r}.'
        )


def _batches(data: Any, cond: Any, size: int, levels: int) -> Iterator[tuple[Tensor, Any]]:
    """Checked integers (n, *) and their conditions, from a tensor in chunks of `size` or from a loader as they come."""
    asked = cond if isinstance(cond, str) else None
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        if asked is not None:
            raise ValueError(
                f"cond={asked!r} goes with a loader; for a tensor of data pass the conditions themselves, or None."
            )
        whole = _images(data, levels)
        conditions.check(cond, whole.shape[0])
        for start in range(0, whole.shape[0], size):
            rows = torch.arange(start, min(start + size, whole.shape[0]))
            yield whole[rows], conditions.take_rows(cond, rows)
        return
    if asked not in (LOADER, IGNORE) and cond is not None:
        raise ValueError(
            f"cond goes with a tensor of data; a loader would not say which rows it belongs to. Let it give (data, condition) and "
            f'pass cond="{LOADER}".'
        )
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be integers (N, ...) or a loader of such batches, got {type(data).__name__}.")
    for batch in data:
        k, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
        if len(rest) != (asked == LOADER) and asked != IGNORE:
            raise ValueError(
                f'the loader gives {len(rest) + 1} entries a batch, with cond={cond!r}. Pass cond="{LOADER}" to take the second of '
                f'two as the condition, cond="{IGNORE}" to score the first alone, or None where there is one.'
            )
        k = _images(k, levels)
        given = rest[0] if asked == LOADER else None
        conditions.check(given, k.shape[0])
        yield k, given


def _images(batch: Any, levels: int) -> Tensor:
    whole = checks.integers(batch, levels)
    if whole.dim() < 2:
        raise ValueError(f"data must have shape (N, ...), or be a loader of such batches, got {tuple(whole.shape)}.")
    return whole
