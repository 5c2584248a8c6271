"""Colours and empty figures. Layer 4; matplotlib is imported when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette: distinguishable with every common colour vision
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
YELLOW, SKY, GREY = "#E69F00", "#56B4E9", "#666666"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, GREY)
EXACT, LEARNED = BLUE, ORANGE  # the same everywhere: what is known, and what was estimated


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to nobody: no window, no entry in pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def axes_or_new(ax: Axes | None, width: float = 4.2, height: float = 3.6) -> Axes:
    """The given axes, or those of a new figure (at `ax.figure`)."""
    return new_figure(width, height).subplots() if ax is None else ax


def bare(ax: Any) -> None:
    """A light grid, and no frame at the top and on the right."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
