"""Densities, score fields and paths in one and two dimensions. Layer 4.

Functions of the plane are given as callables on float64 points (N, 2) and are asked once, for a whole grid: an exact
mixture's `lambda x: model.log_prob(x, t)` and a network's `lambda x: model.score(x.float(), t)` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scoresde.plots.style import BLUE, EXACT, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Extent = tuple[float, float, float, float]
SQUARE: Extent = (-2.0, 2.0, -2.0, 2.0)


def grid_points(extent: Extent = SQUARE, resolution: int = 150) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """(x, y, points): the two axes of a grid over (left, right, bottom, top), and its points (resolution^2, 2), float64."""
    left, right, bottom, top = extent
    if not (left < right and bottom < top):
        raise ValueError(f"extent must be (left, right, bottom, top) with left < right and bottom < top, got {extent}.")
    x, y = np.linspace(left, right, resolution), np.linspace(bottom, top, resolution)
    across, up = np.meshgrid(x, y)
    return x, y, torch.from_numpy(np.stack([across.ravel(), up.ravel()], 1))


def density(
    log_prob: Callable[[Tensor], Tensor],
    *,
    extent: Extent = SQUARE,
    resolution: int = 150,
    ax: Axes | None = None,
    log: bool = False,
    range: tuple[float, float] | None = None,
    cmap: str = "Greys",
) -> Axes:
    """Heat map of a density on the plane from its logarithm in nats, or with `log` of the logarithm itself.

    `log_prob`: (N, 2) -> (N,). `range` fixes the colours' ends, so that two maps can be compared; the image is
    `ax.images[-1]`, for a colour bar.
    """
    shown = log_prob if log else lambda x: log_prob(x).exp()
    ends = range or (None if log else 0.0, None)
    return heat_map(shown, extent=extent, resolution=resolution, ax=ax, range=ends, cmap=cmap)


def heat_map(
    values: Callable[[Tensor], Tensor],
    *,
    extent: Extent = SQUARE,
    resolution: int = 150,
    ax: Axes | None = None,
    range: tuple[float | None, float | None] = (None, None),
    cmap: str = "viridis",
    label: str | None = None,
) -> Axes:
    """Heat map of any function of the plane, (N, 2) -> (N,), for example of the error of a score; with `label` a colour bar.

    `range` fixes the colours' ends; None leaves one to the values.
    """
    ax = axes_or_new(ax)
    _, _, points = grid_points(extent, resolution)
    with torch.no_grad():
        board = values(points).double().cpu().numpy().reshape(resolution, resolution)
    low, high = range
    image = ax.imshow(
        board, extent=extent, origin="lower", cmap=cmap, vmin=low, vmax=high, aspect="equal", interpolation="bilinear"
    )
    if label is not None:
        ax.figure.colorbar(image, ax=ax, label=label, shrink=0.85)
    _square(ax, extent)
    return ax


def score_field(
    score: Callable[[Tensor], Tensor],
    *,
    extent: Extent = SQUARE,
    arrows: int = 17,
    ax: Axes | None = None,
    color: str = EXACT,
    power: float = 0.5,
    scale: float | None = None,
    label: str | None = None,
) -> Axes:
    """Arrows along a score field on the plane, (N, 2) -> (N, 2), `arrows` to each side.

    Scores differ by orders of magnitude, so an arrow is as long as its norm to the `power` (1 is true to scale, 0 shows
    directions only). `scale` is the norm whose arrow spans one cell of the grid, by default the largest there is; give two
    fields the same one to compare them.
    """
    ax = axes_or_new(ax)
    _, _, points = grid_points(extent, arrows)
    with torch.no_grad():
        v = score(points).double().cpu().numpy()
    norm = np.linalg.norm(v, axis=1, keepdims=True).clip(1e-300)
    cell = min(extent[1] - extent[0], extent[3] - extent[2]) / max(arrows - 1, 1)
    v = v / norm * (norm / (scale or float(norm.max()))) ** power * cell * 0.95
    at = points.numpy()
    ax.quiver(
        *at.T,
        *v.T,
        color=color,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.0035,
        pivot="mid",
        label=label,
        zorder=3,
    )
    _square(ax, extent)
    return ax


def points(
    x: Tensor,
    *,
    ax: Axes | None = None,
    extent: Extent | None = None,
    color: str = BLUE,
    size: float = 3.0,
    **options: Any,
) -> Axes:
    """A scatter of points (N, 2); other options are those of `Axes.scatter`."""
    ax = axes_or_new(ax)
    at = x.detach().cpu().numpy()
    style: dict[str, Any] = dict(s=size, color=color, alpha=0.5, lw=0) | options
    ax.scatter(at[:, 0], at[:, 1], **style)
    if extent is not None:
        _square(ax, extent)
    return ax


def marginals(
    log_prob: Callable[[Tensor, float], Tensor],
    *,
    times: Sequence[float],
    extent: tuple[float, float] = (-3.0, 3.0),
    resolution: int = 200,
    ax: Axes | None = None,
    cmap: str = "Greys",
) -> Axes:
    """Heat map of one-dimensional marginals p_t(x), time across, x up; each time is scaled by its own highest density.

    `log_prob`: (x (N, 1), t) -> (N,). Draw `paths` over it. Times may come in any order.
    """
    ax = axes_or_new(ax, 5.2, 3.4)
    x = torch.linspace(*extent, resolution, dtype=torch.float64)[:, None]
    times = sorted(float(t) for t in times)
    with torch.no_grad():
        columns = [log_prob(x, t).double().cpu().numpy() for t in times]
    values = np.exp(np.stack(columns, 1) - np.max(columns, axis=1))
    edges = np.array(times)
    ax.pcolormesh(edges, x[:, 0].numpy(), values, cmap=cmap, vmin=0, vmax=1.15, shading="gouraud", rasterized=True)
    ax.set(xlabel="t  (0 = data, 1 = noise)", ylabel="x", xlim=(times[0], times[-1]), ylim=extent)
    return ax


def paths(
    times: Sequence[float],
    states: Sequence[Tensor],
    *,
    ax: Axes | None = None,
    coordinate: int | None = None,
    color: str = BLUE,
    width: float = 0.8,
    marker: str = "",
    label: str | None = None,
) -> Axes:
    """Paths of a solve, for example of a `samplers.Trajectory`: `states` (B, d) at each of `times`.

    For d = 1, or with `coordinate`, that coordinate against time; for d = 2 in the plane, with a dot at the end.
    A `marker` such as "." shows every state.
    """
    ax = axes_or_new(ax, 5.2, 3.4)
    x = torch.stack([s.detach().cpu().double() for s in states]).numpy()
    if x.ndim != 3 or (coordinate is None and x.shape[2] > 2):
        raise ValueError(
            f"paths are drawn in one or two dimensions, or along one coordinate; got states of shape {x.shape[1:]}. "
            "Give coordinate=."
        )
    if coordinate is None and x.shape[2] == 2:
        for i in range(x.shape[1]):
            ax.plot(
                x[:, i, 0],
                x[:, i, 1],
                color=color,
                lw=width,
                marker=marker,
                ms=3,
                alpha=0.7,
                label=label if i == 0 else None,
            )
        ax.scatter(x[-1, :, 0], x[-1, :, 1], s=8, color=color, zorder=3, lw=0)
        ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        return ax
    lines = ax.plot(list(times), x[:, :, coordinate or 0], color=color, lw=width, marker=marker, ms=3, alpha=0.8)
    lines[0].set_label(label)
    ax.set(xlabel="t  (0 = data, 1 = noise)", ylabel="x" if x.shape[2] == 1 else f"$x_{(coordinate or 0) + 1}$")
    return ax


def _square(ax: Axes, extent: Extent) -> None:
    ax.set(xlim=extent[:2], ylim=extent[2:], xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
