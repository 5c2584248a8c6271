"""Time grids: ends, spacing, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

from scoresde import EDMSDE, VESDE, VPSDE, CosineSDE, DiscreteVPSDE, RectifiedFlow, SubVPSDE, sample
from scoresde.grids import angle, balanced, cosine, given, karras, spread_of, uniform_log_snr, uniform_time
from scoresde.samplers import DDIM, ReverseDiffusion, time_grid

GRIDS = {f.__name__: f for f in (uniform_time, uniform_log_snr, karras, angle, balanced, cosine)}
ALL = (VPSDE(), SubVPSDE(), VESDE(), CosineSDE(), EDMSDE(), RectifiedFlow())


@settings(max_examples=150, deadline=None)
@cases(steps=st.integers(1, 2000), name=st.sampled_from(list(GRIDS)), sde=st.sampled_from(ALL))
def test_every_grid_runs_from_t_max_to_t_min(steps, name, sde):
    """steps + 1 float64 times, strictly decreasing, with exact ends, for any number of steps."""
    t = GRIDS[name](sde, steps)
    assert t.dtype == torch.float64
    assert t.shape == (steps + 1,)
    assert float(t[0]) == sde.t_max
    assert float(t[-1]) == sde.t_min
    assert (t[1:] < t[:-1]).all()


def test_spacing(sde):
    """Each grid is even in its own coordinate: t, log-SNR, (sigma/alpha)^(1/7)."""
    coordinates = {
        "uniform_time": lambda t: t,
        "uniform_log_snr": sde.log_snr,
        "karras": lambda t: torch.exp(-0.5 * sde.log_snr(t) / 7),
    }
    if float(sde.sigma(sde.t_min)) > 0:
        coordinates["balanced"] = lambda t: (1 + 2 * torch.exp(0.5 * sde.log_snr(t))) ** (-1 / 5)
    for name, coordinate in coordinates.items():
        gaps = torch.diff(coordinate(GRIDS[name](sde, 33)))
        torch.testing.assert_close(gaps, gaps.mean().expand(33), rtol=1e-6, atol=0)


def test_karras_is_equation_5():
    """The noise levels of Karras et al. 2022, from 80 to 0.002, on EDM and on VE alike."""
    n = 18
    i = torch.arange(n, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDMSDE().sigma(karras(EDMSDE(), n - 1)), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(EDMSDE().sigma(uniform_time(EDMSDE(), n - 1)), expected, rtol=1e-9, atol=0)
    ve = VESDE(0.002, 80.0, t_min=0.0)
    torch.testing.assert_close(ve.sigma(karras(ve, n - 1)), expected, rtol=1e-9, atol=0)
    assert not torch.allclose(karras(ve, 5, rho=3.0), karras(ve, 5))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_bad_steps(grid):
    """Zero, negative and fractional numbers of steps."""
    for steps in (0, -3):
        with pytest.raises(ValueError, match="at least 1"):
            grid(VPSDE(), steps)
    for steps in (2.0, "3", True, None):
        with pytest.raises(TypeError, match="integer"):
            grid(VPSDE(), steps)


def test_bad_rho():
    """rho has to be positive."""
    with pytest.raises(ValueError, match="rho"):
        karras(VPSDE(), 5, rho=0.0)


@pytest.mark.parametrize(
    "times", [[1.0], [], [0.1, 0.5], [1.0, 0.5, 0.5], [1.2, 0.5], [1.0, -0.1], [1.0, float("nan"), 0.0]]
)
def test_given_times_that_are_no_grid(times):
    """They have to be two or more, decrease strictly and stay in [0, 1]."""
    with pytest.raises(ValueError, match="decrease strictly"):
        given(times)


def test_given_times_are_used_as_they_are():
    """Lists and tensors; the number of steps has to agree."""
    times = [1.0, 0.3, 0.01]
    assert given(times)(VPSDE(), 2).tolist() == times
    assert given(torch.tensor(times, dtype=torch.float64))(VPSDE(), 2).tolist() == times
    with pytest.raises(ValueError, match="2 steps, asked for 5"):
        given(times)(VPSDE(), 5)


def test_time_grid_of_a_sampler(ring8):
    """A sampler's default, another function, or times; coinciding times are refused."""
    sde = VPSDE()
    model = ring8.diffuse(sde)
    assert torch.equal(time_grid(DDIM(), model, None), balanced(sde, 50, spread_of(model.sigma_data, (2,)), 3.0))
    assert torch.equal(time_grid(DDIM(), model, 6, balanced), balanced(sde, 6, spread_of(model.sigma_data, (2,))))
    assert torch.equal(time_grid(ReverseDiffusion(), model, 5), uniform_time(sde, 5))
    assert torch.equal(time_grid(DDIM(), model, 7, karras), karras(sde, 7))
    assert time_grid(DDIM(), model, None, [1.0, 0.5]).tolist() == [1.0, 0.5]
    assert time_grid(DDIM(), model, None, torch.tensor([1.0, 0.5])).tolist() == [1.0, 0.5]
    for steps in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            time_grid(DDIM(), model, steps)
    with pytest.raises(ValueError, match="does not decrease strictly"):
        time_grid(DDIM(), model, 3, lambda sde, steps: torch.tensor([1.0, 0.5, 0.5, 0.1]))
    seen = []
    sample(
        ring8.diffuse(sde), (2, 2), method="ddim", grid=[1.0, 0.4, 0.2], seed=0, trajectory=lambda t, x: seen.append(t)
    )
    assert seen == [1.0, 0.4, 0.2, 0.2]


def test_steps_that_contradict_a_grid(ring8):
    """steps=5 with a grid of 2 intervals is a contradiction, not a choice."""
    with pytest.raises(ValueError, match="2 steps, asked for 5"):
        time_grid(DDIM(), ring8.diffuse(VPSDE()), 5, [1.0, 0.5, 0.1])


@pytest.mark.parametrize(
    "times",
    [
        [True, False],
        torch.tensor([True, False]),
        [1 + 0j, 0j],
        torch.tensor([1.0, 0.5], dtype=torch.complex64),
        ["1", "0"],
        "grid",
        None,
        [[1.0], [0.5, 0.2]],
    ],
)
def test_times_that_are_no_real_numbers(times):
    """Booleans were taken for 1 and 0, complex numbers lost their imaginary part."""
    with pytest.raises(TypeError, match="real numbers"):
        given(times)


def test_a_long_grid_is_not_printed_whole():
    """The error is one line."""
    with pytest.raises(ValueError, match="decrease strictly") as e:
        given(torch.linspace(0, 1, 10_000))
    assert len(str(e.value)) < 400


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: VPSDE(t_min="a"), "t_min"),
        (lambda: VPSDE(t_min=math.nan), "t_min"),
        (lambda: CosineSDE(log_snr_min="a"), "log_snr_min"),
        (lambda: CosineSDE(log_snr_max=math.nan), "log_snr_max"),
        (lambda: RectifiedFlow(t_max=True), "t_max"),
        (lambda: DiscreteVPSDE(0.1), "betas"),
        (lambda: DiscreteVPSDE([0.1, None]), "betas"),
        (lambda: DiscreteVPSDE([0.1, 0.2j]), "betas"),
        (lambda: DiscreteVPSDE([0.1, math.nan]), "beta"),
    ],
)
def test_schedules_of_the_wrong_kind(make, name):
    """One line that names the option."""
    with pytest.raises((TypeError, ValueError), match=name):
        make()


def test_the_spread_of_data():
    """Examples of 784 numbers of standard deviation 1/2 lie 14 from their mean; a model hands its own to the grid."""
    assert spread_of(0.5, (1, 28, 28)) == pytest.approx(14.0)
    g = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(500, 784, generator=g)
    assert float(x.square().sum(1).mean().sqrt()) == pytest.approx(14.0, rel=0.01)
    sde = VPSDE()
    r = torch.exp(-0.5 * sde.log_snr(balanced(sde, 12, 14.0)))
    gaps = ((r / (r + 28)) ** (1 / 5)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(12), rtol=1e-6, atol=0)
