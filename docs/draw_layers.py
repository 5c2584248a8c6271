"""Draws docs/layers.svg, the picture of the layers in design.md: `python docs/draw_layers.py`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

LAYERS = [
    ("the person", ["cli"], "#f3f3f3"),
    ("the outside world", ["data", "jobs", "train", "interop", "plots"], "#e8e1f0"),
    (
        "what to compute",
        ["samplers", "latents", "likelihood", "sampling", "distill", "guidance", "metrics", "store"],
        "#dcebf7",
    ),
    ("the denoiser", ["models", "losses", "flow"], "#dff1e6"),
    ("alpha, sigma, time", ["sde", "grids"], "#fdf1d8"),
    ("torch only", ["checks", "numerics", "rng", "modes", "progress", "conditions", "ode", "nets"], "#f9e1d6"),
]


def main() -> None:
    figure = Figure(figsize=(10.8, 5.0))
    FigureCanvasSVG(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 108), ylim=(0, 50))
    ax.axis("off")
    for i, (title, rooms, colour) in enumerate(LAYERS):
        y = 42 - 8 * i
        ax.add_patch(FancyBboxPatch((1, y), 102, 6.2, boxstyle="round,pad=0.2", fc=colour, ec="#888888", lw=0.8))
        ax.text(2.2, y + 3.1, title, va="center", fontsize=10, weight="bold")
        for j, room in enumerate(rooms):
            x = 23.0 + 10.0 * j
            ax.add_patch(
                FancyBboxPatch((x, y + 1), 9.0, 4.2, boxstyle="round,pad=0.2", fc="white", ec="#888888", lw=0.8)
            )
            ax.text(x + 4.5, y + 3.1, room, va="center", ha="center", fontsize=8.5, family="monospace")
    ax.annotate("", (105.5, 3), (105.5, 47), arrowprops=dict(arrowstyle="-|>", color="#444444"))
    ax.text(106.6, 25, "imports point down", rotation=270, va="center", ha="center", fontsize=9, color="#444444")
    figure.savefig(Path(__file__).with_name("layers.svg"))


if __name__ == "__main__":
    main()
