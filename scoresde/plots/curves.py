"""Numbers against numbers: training, errors, log densities. Layer 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scoresde.plots.style import BLUE, EXACT, GREY, LEARNED, ORANGE, PALETTE, axes_or_new, bare, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"


def error_against_nfe(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    ax: Axes | None = None,
    ylabel: str = "error",
    floor: float | None = None,
) -> Axes:
    """Error against the number of network evaluations, both logarithmic, one line per entry: label -> [(nfe, error), ...].

    `floor` draws the error that nothing can go below, for example of sampling noise.
    """
    ax = axes_or_new(ax, 5.2, 3.8)
    for i, (label, points) in enumerate(curves.items()):
        nfe, error = zip(*sorted(points), strict=True)
        style: dict[str, Any] = dict(
            color=PALETTE[i % len(PALETTE)], marker=_MARKERS[i % len(_MARKERS)], ms=4.5, lw=1.3
        )
        ax.plot(nfe, error, label=label, ls="--" if i >= len(PALETTE) else "-", **style)
    if floor is not None:
        ax.axhline(floor, color=GREY, ls=":", lw=1.2, label="noise floor")
    ax.set(xscale="log", yscale="log", xlabel="network evaluations (NFE)", ylabel=ylabel)
    spent = sorted({nfe for points in curves.values() for nfe, _ in points})
    shown = [n for i, n in enumerate(spent) if i == 0 or n > 1.25 * spent[i - 1] or len(spent) < 5]
    ax.set_xticks(shown, [f"{n:g}" for n in shown], minor=False)
    ax.set_xticks([], minor=True)
    bare(ax)
    ax.legend(frameon=False, fontsize=8)
    return ax


def log_likelihood_histogram(
    groups: Mapping[str, Tensor], *, ax: Axes | None = None, bins: int = 40, unit: str = "log density (nats)"
) -> Axes:
    """Histograms of log densities or bits/dim on common bins, one outline per entry: label -> (N,)."""
    ax = axes_or_new(ax, 5.2, 3.4)
    values = {k: v.detach().cpu().double().numpy() for k, v in groups.items()}
    joined = np.concatenate([v[np.isfinite(v)] for v in values.values()])
    edges = np.histogram_bin_edges(joined, bins).tolist()
    for i, (label, v) in enumerate(values.items()):
        color = PALETTE[i % len(PALETTE)]
        ax.hist(v, edges, histtype="stepfilled", density=True, color=color, alpha=0.18)
        ax.hist(v, edges, histtype="step", density=True, color=color, lw=1.4, label=label)
    ax.set(xlabel=unit, ylabel="share per unit")
    bare(ax)
    ax.legend(frameon=False, fontsize=8)
    return ax


def histogram(
    x: Tensor,
    *,
    log_prob: Callable[[Tensor], Tensor] | None = None,
    range: tuple[float, float] | None = None,
    bins: int = 60,
    ax: Axes | None = None,
    color: str = LEARNED,
    label: str | None = None,
) -> Axes:
    """Histogram of one-dimensional samples, (N,) or (N, 1), and over it the density whose logarithm (N, 1) -> (N,) is given."""
    ax = axes_or_new(ax, 4.6, 3.2)
    v = x.detach().cpu().double().reshape(-1).numpy()
    low, high = range or (float(v.min()), float(v.max()))
    ax.hist(v, np.linspace(low, high, bins + 1).tolist(), density=True, color=color, alpha=0.4, label=label)
    if log_prob is not None:
        at = torch.linspace(low, high, 400, dtype=torch.float64)
        with torch.no_grad():
            ax.plot(at, log_prob(at[:, None]).double().exp().cpu(), color=EXACT, lw=1.6, label="exact")
    ax.set(xlabel="x", ylabel="density")
    bare(ax)
    return ax


def calibration(
    error: Tensor, stderr: Tensor, *, ax: Axes | None = None, bins: int = 30, label: str = "error / standard error"
) -> Axes:
    """Histogram of errors in units of their reported standard errors, (N,) each, over the standard normal density.

    A standard error that means what it says gives the normal curve; the title tells the root mean square, 1 if it does.
    """
    ax = axes_or_new(ax, 4.6, 3.4)
    z = (error.detach().cpu().double() / stderr.detach().cpu().double()).numpy()
    reach = float(max(3.5, np.quantile(np.abs(z), 0.995)))
    grid = np.linspace(-reach, reach, 200)
    ax.hist(z, np.linspace(-reach, reach, bins + 1).tolist(), density=True, color=ORANGE, alpha=0.35, label=label)
    ax.plot(grid, np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi), color=EXACT, lw=1.6, label="standard normal")
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])  # room for the legend
    ax.set(xlabel="error in standard errors", ylabel="density", title=f"root mean square {np.sqrt((z**2).mean()):.2f}")
    bare(ax)
    ax.legend(frameon=False, fontsize=8)
    return ax


def training_curves(history: Sequence[Mapping[str, float]], test: float | None = None) -> Figure:
    """Training loss (noise error per dimension) and validation bits/dim against the step, side by side.

    `history` holds records with "step" and either "loss" or "bits_per_dim" and "stderr"; `test` draws a line.
    """
    figure = new_figure(9, 3.3)
    left, right = figure.subplots(1, 2)
    loss = [(r["step"], r["loss"]) for r in history if "loss" in r]
    bits = [(r["step"], r["bits_per_dim"], r["stderr"]) for r in history if "bits_per_dim" in r]
    if loss:
        left.plot(*zip(*loss, strict=True), color=BLUE, lw=1)
    left.set(xlabel="step", ylabel="squared noise error per dimension", title="Training loss")
    left.set_ylim(*_range([v for _, v in loss[len(loss) // 20 :]]))
    if bits:
        steps, mean, error = zip(*bits, strict=True)
        right.errorbar(steps, mean, error, color=BLUE, marker="o", ms=3, lw=1, capsize=2, label="validation, ELBO")
    if test is not None:
        right.axhline(test, color=ORANGE, ls="--", lw=1.2, label=f"test, exact ODE: {test:.3f}")
    right.set(xlabel="step", ylabel="bits/dim", title="Bits per dimension")
    shown = [value for _, value, _ in bits] + ([] if test is None else [test])
    if shown:
        right.set_ylim(min(shown) - 0.06, max(shown) + 0.06)
        right.legend(frameon=False, fontsize=9)
    for ax in (left, right):
        bare(ax)
    return figure


def _range(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    low, high = min(values), max(values)
    gap = 0.05 * (high - low) or 0.05
    return low - gap, high + gap
