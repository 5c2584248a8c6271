"""Figures. Functions with `ax=` draw into given axes or a figure of their own and return the axes; the others return a figure.

Nothing touches pyplot or any other global state, and nothing needs a display. Layer 4; matplotlib is imported when used.
Colours are the same everywhere: `EXACT` for what is known, `LEARNED` for what was estimated.
"""

from scoresde.plots.curves import calibration, error_against_nfe, histogram, log_likelihood_histogram, training_curves
from scoresde.plots.fields import density, grid_points, heat_map, marginals, paths, points, score_field
from scoresde.plots.images import GAP, reverse_path, sample_grids, save, tile
from scoresde.plots.motion import animate, save_animation
from scoresde.plots.style import BLUE, EXACT, GREEN, GREY, LEARNED, ORANGE, PALETTE, PURPLE

__all__ = [
    "BLUE",
    "EXACT",
    "GAP",
    "GREEN",
    "GREY",
    "LEARNED",
    "ORANGE",
    "PALETTE",
    "PURPLE",
    "animate",
    "calibration",
    "density",
    "error_against_nfe",
    "grid_points",
    "heat_map",
    "histogram",
    "log_likelihood_histogram",
    "marginals",
    "paths",
    "points",
    "reverse_path",
    "sample_grids",
    "save",
    "save_animation",
    "score_field",
    "tile",
    "training_curves",
]
