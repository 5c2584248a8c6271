"""Images side by side. Layer 4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from scoresde.plots.style import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 0.15  # between tiles, light where 0 is drawn white


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG at 150 dots per inch."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path


def tile(images: Tensor, columns: int, low: float = 0.0, high: float = 1.0, pad: int = 1) -> np.ndarray:
    """Images (N, c, h, w), c = 1 or 3, side by side as one array (H, W) or (H, W, 3) in [0, 1], with light gaps."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (N, 1 or 3, h, w), got {tuple(images.shape)}.")
    if not high > low:
        raise ValueError(f"high must be above low, got low={low}, high={high}.")
    x = ((images.detach().cpu().double() - low) / (high - low)).clamp(0, 1).movedim(1, -1).numpy()
    n, h, w, c = x.shape
    rows = math.ceil(n / columns)
    board = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, c), GAP)
    for i, image in enumerate(x):
        top, left = (i // columns) * (h + pad) + pad, (i % columns) * (w + pad) + pad
        board[top : top + h, left : left + w] = image
    return board[..., 0] if c == 1 else board


def _show(axes: Any, board: np.ndarray, title: str) -> None:
    axes.imshow(board, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def sample_grids(groups: Mapping[str, Tensor], *, columns: int = 8, low: float = 0.0, high: float = 1.0) -> Figure:
    """One grid of images per entry, for example real ones beside each method's samples. `groups`: title -> (N, c, h, w)."""
    across = min(3, len(groups))
    down = math.ceil(len(groups) / across)
    figure = new_figure(3.1 * across, 3.3 * down)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, (title, images) in zip(axes, groups.items(), strict=False):
        _show(ax, tile(images, columns, low, high), title)
    return figure


def reverse_path(times: Sequence[float], states: Sequence[Tensor], *, low: float = -1.0, high: float = 1.0) -> Figure:
    """Samples along the reverse process: one row per sample, one column per time, noise on the left.

    `times` (T,) decreasing; `states`, T tensors (N, c, h, w). Each column is scaled by its own spread, so that the
    noise can be seen, moving to [low, high] as t falls.
    """
    figure = new_figure(1.0 * len(times) + 0.3, 0.86 * states[0].shape[0] + 0.4)
    axes = figure.subplots(1, len(times), squeeze=False)[0]
    for ax, t, x in zip(axes, times, states, strict=True):
        reach = max(1.0, float(x.std()) / 0.75)
        _show(ax, tile(x, 1, low * reach, high * reach), f"t = {t:.2g}")
    return figure
