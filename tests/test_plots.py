"""Figures: geometry of the tiles, values that are drawn, and no trace in matplotlib's global state."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import scoresde
from scoresde import plots


def test_tiles_are_where_they_should_be():
    """Image i stands at row i // columns, column i % columns, in [0, 1], between gaps of one light pixel."""
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
    board = plots.tile(images, 2, low=0.0, high=8.0)
    assert board.shape == (3 * (2 + 1) + 1, 2 * (3 + 1) + 1)
    for i in range(5):
        top, left = (i // 2) * 3 + 1, (i % 2) * 4 + 1
        assert np.array_equal(board[top : top + 2, left : left + 3], np.full((2, 3), i / 8))
    gaps = np.ones_like(board, dtype=bool)
    for i in range(5):
        gaps[(i // 2) * 3 + 1 : (i // 2) * 3 + 3, (i % 2) * 4 + 1 : (i % 2) * 4 + 4] = False
    assert np.array_equal(board[gaps], np.full(gaps.sum(), plots.GAP))


def test_colour_tiles_and_integers():
    """Three channels come last; integer levels are scaled like floats; values outside are cut off."""
    k = torch.zeros(1, 3, 2, 2, dtype=torch.int64)
    k[0, 1] = 255
    k[0, 2] = 300
    board = plots.tile(k, 4, high=255.0, pad=0)
    assert board.shape == (2, 8, 3)
    assert np.array_equal(board[:, :2], np.broadcast_to([0.0, 1.0, 1.0], (2, 2, 3)))
    assert np.array_equal(plots.tile(torch.full((1, 1, 1, 1), -3.0), 1, low=-1.0, pad=0), [[0.0]])


def test_tile_takes_what_a_model_gives():
    """Tensors with a gradient, in bfloat16, not contiguous."""
    x = torch.rand(4, 1, 3, 3, requires_grad=True)
    assert plots.tile(x, 2).shape == (9, 9)
    assert plots.tile(x.bfloat16().transpose(2, 3), 2).shape == (9, 9)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 2, 8, 8), (1, 1, 4, 4, 4)])
def test_tile_needs_images(shape):
    """Another rank or number of channels is named with the shape."""
    with pytest.raises(ValueError, match=r"\(N, 1 or 3, h, w\), got \(" + ", ".join(map(str, shape))):
        plots.tile(torch.zeros(shape), 2)


def test_tile_needs_a_range():
    """high above low, else division by zero."""
    with pytest.raises(ValueError, match="high must be above low"):
        plots.tile(torch.zeros(1, 1, 2, 2), 1, low=1.0, high=1.0)


def groups(n):
    return {f"title {i}": torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(n)}


@pytest.mark.parametrize(("n", "cells"), [(1, 1), (3, 3), (4, 6), (6, 6)])
def test_sample_grids(n, cells):
    """One titled picture per group, in rows of three at most."""
    given = groups(n)
    figure = plots.sample_grids(given, columns=3)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == cells
    for ax, (title, images) in zip(figure.axes, given.items(), strict=False):
        assert ax.get_title() == title
        assert np.array_equal(ax.images[0].get_array(), plots.tile(images, 3))
        assert ax.images[0].get_clim() == (0, 1)
    assert all(not ax.images for ax in figure.axes[n:])


def test_reverse_path():
    """One column per time, titled with it; wide noise is scaled down so that it can be seen, data are not."""
    g = torch.Generator().manual_seed(0)
    states = [3.0 * torch.randn(2, 1, 4, 4, generator=g), torch.rand(2, 1, 4, 4, generator=g) * 2 - 1]
    figure = plots.reverse_path([1.0, 0.01], states)
    assert [ax.get_title() for ax in figure.axes] == ["t = 1", "t = 0.01"]
    noise, data = (ax.images[0].get_array() for ax in figure.axes)
    assert noise.shape == (11, 6)
    assert np.array_equal(data, plots.tile(states[1], 1, -1.0, 1.0))
    assert np.mean((noise == 0) | (noise == 1)) < 0.25  # not cut off to black and white
    with pytest.raises(ValueError, match=r"shorter|longer"):
        plots.reverse_path([1.0, 0.5, 0.1], states)


HISTORY = [
    {"step": 25, "loss": 0.9},
    {"step": 50, "loss": 0.6},
    {"step": 50, "bits_per_dim": 2.2, "stderr": 0.1, "seconds": 3.0},
    {"step": 75, "loss": 0.5},
    {"step": 100, "bits_per_dim": 2.0, "stderr": 0.1, "seconds": 6.0},
]


def test_training_curves():
    """Losses on the left, bits/dim with their errors on the right, the test result as a line with its number."""
    left, right = plots.training_curves(HISTORY, 1.987).axes
    assert np.array_equal(left.lines[0].get_xydata(), [(25, 0.9), (50, 0.6), (75, 0.5)])
    assert np.array_equal(right.containers[0].lines[0].get_xydata(), [(50, 2.2), (100, 2.0)])
    assert any("1.987" in t.get_text() for t in right.get_legend().get_texts())
    assert left.get_xlabel() == right.get_xlabel() == "step"
    assert left.get_ylabel()
    assert right.get_ylabel() == "bits/dim"


@pytest.mark.parametrize("history", [[], HISTORY[:2], HISTORY[2:3]], ids=["nothing", "losses", "one evaluation"])
def test_training_curves_of_little(history, tmp_path):
    """A run that was stopped early can be drawn, too."""
    assert plots.save(plots.training_curves(history), tmp_path / "a.png").stat().st_size > 1000


def test_save(tmp_path):
    """A PNG that is not blank, in a folder that is made, at 150 dots per inch."""
    path = plots.save(plots.sample_grids(groups(2)), tmp_path / "new" / "grid.png")
    assert path == tmp_path / "new" / "grid.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (round(6.2 * 150), round(3.3 * 150))
        assert np.asarray(image.convert("L")).std() > 10


HEADLESS = """
import sys, torch
from scoresde import plots
x = torch.rand(4, 1, 4, 4)
plots.save(plots.sample_grids({"a": x}), sys.argv[1] + "/a.png")
plots.save(plots.reverse_path([1.0, 0.0], [x, x]), sys.argv[1] + "/b.png")
plots.save(plots.training_curves([{"step": 1, "loss": 1.0}]), sys.argv[1] + "/c.png")
assert "matplotlib.pyplot" not in sys.modules
"""


def test_no_pyplot_and_no_display(tmp_path):
    """Without a display, and with a backend that needs one, figures are written; pyplot is never imported."""
    root = str(Path(scoresde.__file__).parents[1])
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": root, "MPLBACKEND": "TkAgg"}
    run = subprocess.run(
        [sys.executable, "-c", HEADLESS, str(tmp_path)],
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert {"a.png", "b.png", "c.png"} <= {p.name for p in tmp_path.iterdir()}


def test_open_figures_of_the_user_stay(tmp_path):
    """pyplot's list of figures and its options are as they were."""
    import matplotlib
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), dict(matplotlib.rcParams)
    plots.save(plots.sample_grids(groups(1)), tmp_path / "a.png")
    plots.training_curves(HISTORY)
    assert (plt.get_fignums(), dict(matplotlib.rcParams)) == before
