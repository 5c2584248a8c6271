"""Fields, paths, curves and animations: the numbers that are drawn, given axes, and no trace in pyplot."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from scoresde import VPSDE, GaussianMixture, plots

NORMAL = GaussianMixture.isotropic([[0.5, 0.0]], std=0.5)
EXTENT = (-1.0, 2.0, -1.0, 1.0)


def axes():
    return Figure().subplots()


def test_density_is_the_density():
    """The image holds exp(log p) on the grid, bottom row first; with log the logarithm; the ends of the colours as told."""
    ax = axes()
    assert plots.density(NORMAL.log_prob, extent=EXTENT, resolution=31, ax=ax) is ax
    x, y, points = plots.grid_points(EXTENT, 31)
    values = NORMAL.log_prob(points).numpy().reshape(31, 31)
    image = ax.images[0]
    np.testing.assert_allclose(image.get_array(), np.exp(values))
    assert image.origin == "lower"
    assert tuple(image.get_extent()) == EXTENT
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert (x[column], y[row]) == (pytest.approx(0.5), pytest.approx(0.0))
    plots.density(NORMAL.log_prob, extent=EXTENT, resolution=31, ax=ax, log=True, range=(-5.0, 1.0))
    np.testing.assert_allclose(ax.images[1].get_array(), values)
    assert ax.images[1].get_clim() == (-5.0, 1.0)


def test_arrows_point_along_the_score():
    """Directions are the field's; lengths grow with the power of the norm, one cell for the norm `scale`."""
    ax = axes()
    plots.score_field(NORMAL.score if hasattr(NORMAL, "score") else lambda x: -x, arrows=5, ax=ax, power=1.0, scale=2.0)
    quiver = ax.collections[0]
    _, _, points = plots.grid_points(arrows_extent := (-2.0, 2.0, -2.0, 2.0), 5)
    field = (NORMAL.score(points) if hasattr(NORMAL, "score") else -points).numpy()
    cell = (arrows_extent[1] - arrows_extent[0]) / 4
    np.testing.assert_allclose(np.stack([quiver.U, quiver.V], 1), field / 2.0 * cell * 0.95, atol=1e-12)
    ax = axes()
    plots.score_field(lambda x: -x, arrows=4, ax=ax, power=0.0)
    lengths = np.hypot(ax.collections[0].U, ax.collections[0].V)
    np.testing.assert_allclose(lengths, lengths[0])


def test_marginals_are_scaled_in_each_time():
    """Each column has the highest value 1, at the mode of its time, whatever the order of the times."""
    model = GaussianMixture.isotropic([[1.0]], std=0.3).diffuse(VPSDE())
    ax = axes()
    plots.marginals(model.log_prob, times=[1.0, 0.01, 0.5], extent=(-3.0, 3.0), resolution=301, ax=ax)
    values = np.asarray(ax.collections[0].get_array()).reshape(301, 3)
    np.testing.assert_allclose(values.max(0), 1.0)
    at = np.linspace(-3, 3, 301)[values.argmax(0)]
    alpha = VPSDE().alpha(torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64)).numpy()
    np.testing.assert_allclose(at, alpha, atol=0.011)
    assert ax.get_xlim() == (0.01, 1.0)


def test_paths():
    """Against time in one dimension or along a coordinate, in the plane in two; more needs a coordinate."""
    times = [1.0, 0.5, 0.0]
    states = [torch.arange(6.0).reshape(3, 2) + t for t in times]
    ax = plots.paths(times, states, ax=axes())
    assert len(ax.lines) == 3
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[3.0, 4.0], [2.5, 3.5], [2.0, 3.0]])
    ax = plots.paths(times, states, ax=axes(), coordinate=1, label="second")
    np.testing.assert_allclose(ax.lines[2].get_xydata(), [[1.0, 6.0], [0.5, 5.5], [0.0, 5.0]])
    assert [line.get_label() == "second" for line in ax.lines] == [True, False, False]
    ax = plots.paths(times, [s[:, :1] for s in states])
    assert len(ax.lines) == 3
    with pytest.raises(ValueError, match="coordinate="):
        plots.paths(times, [torch.zeros(3, 5)] * 3)


def test_points_and_extent():
    """Every point is there, within the given square."""
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    ax = plots.points(x, extent=EXTENT, color="red", s=9)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), x.numpy(), rtol=1e-6)
    assert ax.get_xlim() == EXTENT[:2]
    for bad in ((1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="extent"):
            plots.grid_points(bad)


def test_error_against_nfe():
    """One line per method in order of cost, both axes logarithmic, ticks at the costs, the floor dotted."""
    ax = plots.error_against_nfe({"a": [(20, 0.1), (5, 0.5)], "b": [(10, 0.2)]}, floor=0.01)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[5, 0.5], [20, 0.1]])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["5", "10", "20"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b", "noise floor"]


def test_histograms_share_their_bins():
    """Common edges over all groups, densities that integrate to one."""
    groups = {"one": torch.linspace(0, 1, 50), "two": torch.linspace(3, 4, 50)}
    ax = plots.log_likelihood_histogram(groups, bins=8)
    outlines = [p for p in ax.patches if not p.get_fill()]
    assert len(outlines) == 2
    for outline in outlines:
        xy = outline.get_xy()
        widths, heights = np.diff(xy[:, 0]), xy[:-1, 1]
        assert float((widths * heights)[widths > 0].sum()) == pytest.approx(1.0)


def test_calibration_tells_the_root_mean_square():
    """Errors twice their standard errors give 2.00 in the title."""
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double()
    ax = plots.calibration(2 * 3 * z, torch.full_like(z, 3.0))
    assert ax.get_title().startswith(f"root mean square {2 * float(z.square().mean().sqrt()):.2f}")


def test_animations(tmp_path):
    """A GIF with a frame for each different time, a page with controls, errors in words; frames show the states."""
    states = [torch.full((4, 2), float(i)) for i in range(3)]
    film = plots.animate(
        [1.0, 0.5, 0.0], states, extent=(-1.0, 3.0, -1.0, 3.0), log_prob=lambda x, t: -x.square().sum(1), hold=2
    )
    path = plots.save_animation(film, tmp_path / "new" / "film.gif", dpi=40)
    with Image.open(path) as image:
        assert image.n_frames >= 3
    page = plots.save_animation(film, tmp_path / "film.html", dpi=40)
    assert "base64" in page.read_text()
    with pytest.raises(ValueError, match=r"\.gif or \.html"):
        plots.save_animation(film, tmp_path / "film.mp4")
    for times, bad in (([1.0], states), ([], []), ([1.0], [torch.zeros(4, 3)])):
        with pytest.raises(ValueError, match="state"):
            plots.animate(times, bad)


def test_pyplot_knows_nothing_of_it():
    """New figures are not pyplot's, and its backend stays."""
    import matplotlib.pyplot as plt

    before = (plt.get_fignums(), matplotlib.get_backend())
    ax = plots.density(NORMAL.log_prob, resolution=5)
    assert isinstance(ax.figure, Figure)
    assert (plt.get_fignums(), matplotlib.get_backend()) == before
    assert math.isclose(ax.get_xlim()[1], 2.0)


def test_heat_map_of_any_function():
    """The values as they are, between the given ends, with a colour bar where there is a label."""
    figure = Figure()
    ax = figure.subplots()
    plots.heat_map(lambda x: x[:, 0] - x[:, 1], resolution=5, ax=ax, range=(-1.0, 1.0), label="difference")
    x, y, _ = plots.grid_points(resolution=5)
    np.testing.assert_allclose(ax.images[0].get_array(), x[None, :] - y[:, None])
    assert ax.images[0].get_clim() == (-1.0, 1.0)
    assert len(figure.axes) == 2


def test_histogram_beside_its_density():
    """Bars that integrate to the share within the range, under the closed form."""
    line = GaussianMixture.isotropic([[0.0]], std=1.0)
    x = line.sample(5000, seed=0)
    ax = plots.histogram(x, log_prob=line.log_prob, range=(-3.0, 3.0), bins=30)
    heights = np.array([p.get_height() for p in ax.patches])
    assert float(heights.sum() * 0.2) == pytest.approx(1.0)
    curve = ax.lines[0].get_xydata()
    np.testing.assert_allclose(curve[:, 1], np.exp(-0.5 * curve[:, 0] ** 2) / math.sqrt(2 * math.pi), rtol=1e-10)
