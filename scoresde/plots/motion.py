"""Moving pictures of the forward and reverse process. Layer 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scoresde.plots.fields import SQUARE, Extent, density, grid_points
from scoresde.plots.style import BLUE, new_figure

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation

_RESOLUTION = 90  # of the density behind the points: a grid for every frame


def animate(
    times: Sequence[float],
    states: Sequence[Tensor],
    *,
    extent: Extent = SQUARE,
    log_prob: Callable[[Tensor, float], Tensor] | None = None,
    color: str = BLUE,
    fps: float = 15.0,
    hold: int = 10,
) -> FuncAnimation:
    """Points (B, 2) moving through `states`, one frame for each of `times`, the last held for `hold` frames.

    `log_prob`: (x (N, 2), t) -> (N,) draws the density of each time behind them. For a process that grows, such as VE, choose
    the extent for its widest time. The result saves itself (`save_animation`) and shows itself
    (`IPython.display.HTML(result.to_jshtml())`).
    """
    from matplotlib.animation import FuncAnimation

    if len(times) != len(states) or not len(states):
        raise ValueError(f"there must be one state for each time and at least one, got {len(times)} and {len(states)}.")
    if states[0].dim() != 2 or states[0].shape[1] != 2:
        raise ValueError(f"states must have shape (B, 2), got {tuple(states[0].shape)}.")
    figure = new_figure(3.8, 3.9)
    figure.set_layout_engine("none")  # laid out once, not for every frame
    ax = figure.add_axes((0.16, 0.13, 0.8, 0.78))
    x = torch.stack([s.detach().cpu().double() for s in states]).numpy()
    if log_prob is not None:
        density(lambda p: log_prob(p, float(times[0])), extent=extent, resolution=_RESOLUTION, ax=ax)
    ax.set(xlim=extent[:2], ylim=extent[2:], xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    dots = ax.scatter(x[0, :, 0], x[0, :, 1], s=7, color=color, alpha=0.8, lw=0, zorder=3)
    title = ax.set_title("")

    def draw(frame: int) -> list[Any]:
        i = min(frame, len(x) - 1)
        dots.set_offsets(x[i])
        title.set_text(f"t = {float(times[i]):.2f}")
        if log_prob is not None:
            _, _, at = grid_points(extent, _RESOLUTION)
            with torch.no_grad():
                values = log_prob(at, float(times[i])).double().exp().cpu().numpy().reshape(_RESOLUTION, _RESOLUTION)
            ax.images[0].set_data(values)
            ax.images[0].set_clim(0, values.max())
        return [dots, title]

    return FuncAnimation(figure, draw, frames=len(x) + hold, interval=1000 / fps, blit=False)


def save_animation(animation: FuncAnimation, path: str | Path, *, dpi: int = 80) -> Path:
    """Write a GIF (no other program is needed), or for a name in .html a page with controls; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        animation.save(str(path), writer="pillow", dpi=dpi)  # as many frames a second as the animation has
    elif path.suffix == ".html":
        path.write_text(animation.to_jshtml(default_mode="loop"))
    else:
        raise ValueError(f"an animation is saved as .gif or .html, got {path.name}.")
    return path
