"""The Brownian path: its law, and that it does not depend on how it is queried."""

import math
import random
from itertools import pairwise

import pytest
import torch
from scipy import stats

from scoresde.rng import RandomSource
from scoresde.samplers.brownian import TICKS, UNIT, BrownianPath, _left, _splitmix


def uniform(steps, start=1.0, end=0.0):
    """steps + 1 equally spaced times."""
    return torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()


def warped(steps):
    """Times that crowd at 0, as grids in the noise level do; they meet no node of the tree."""
    return [(0.002 ** (1 / 7) + (1 - 0.002 ** (1 / 7)) * k / steps) ** 7 - 0.002 for k in range(steps, 0, -1)] + [0.0]


def increments(path, times):
    return torch.stack([path.increment(t, s) for t, s in pairwise(times)])


# -- law -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [uniform(50), uniform(37), warped(40)], ids=["nodes", "between", "warped"])
def test_increments_are_independent_normals(times):
    """dW / sqrt(h) is standard normal (Kolmogorov-Smirnov, variance per step) and uncorrelated between steps."""
    n = 20_000
    path = BrownianPath((n, 1), 1, dtype=torch.float64)
    h = -torch.tensor(times, dtype=torch.float64).diff()
    z = increments(path, times).squeeze(-1) / h.sqrt()[:, None]
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    assert float(z.mean(1).abs().max()) < 4.5 / math.sqrt(n)
    assert float((z.var(1) - 1).abs().max()) < 4.5 * math.sqrt(2 / n)
    correlation = torch.corrcoef(z) - torch.eye(len(h), dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(n)


def test_covariance_is_the_smaller_time():
    """Cov(W(s), W(t)) = min(s, t) - a for times measured from a, here on [-1, 3]."""
    n, times = 40_000, [-0.9, -0.123, 0.0, 0.77, 1.5, 2.71, 3.0]
    path = BrownianPath((n, 1), 2, -1.0, 3.0, dtype=torch.float64)
    w = torch.stack([path.value(t).squeeze(-1) for t in times])
    t = torch.tensor(times, dtype=torch.float64) + 1
    torch.testing.assert_close(torch.cov(w), torch.minimum(t[:, None], t), atol=0.1, rtol=0)
    assert float(path.value(-1.0).abs().max()) == 0.0


def test_entries_of_one_sample_are_independent():
    """Rows and channels of (B, c, h, w) do not repeat one another."""
    path = BrownianPath((64, 3, 4, 5), 3)
    dw = path.increment(0.75, 0.25)
    assert dw.shape == (64, 3, 4, 5)
    assert dw.dtype == torch.float32
    assert dw.unique().numel() > 0.999 * dw.numel()
    assert float(dw.var()) == pytest.approx(0.5, rel=0.1)


# -- one path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_order_of_queries_gives_the_same_bits(dtype):
    """Forwards, backwards, shuffled, or alone on a fresh path."""
    times = sorted({*uniform(50), *uniform(33), *warped(20)})
    values = {t: BrownianPath((4, 3), 5, dtype=dtype).value(t) for t in times}
    for order in (times, times[::-1], random.Random(0).sample(times, len(times))):
        path = BrownianPath((4, 3), 5, dtype=dtype)
        for t in order:
            assert torch.equal(path.value(t), values[t])


@pytest.mark.parametrize(("coarse", "factor"), [(50, 2), (100, 5), (500, 2), (30, 2), (7, 9)])
def test_fine_steps_add_up_to_coarse_ones(coarse, factor):
    """The sum over the finer grid is the coarser grid's increment."""
    a, b = (
        increments(BrownianPath((8, 2), 6, 1e-5, 1.0, dtype=torch.float64), uniform(n, 1.0, 1e-5))
        for n in (coarse, coarse * factor)
    )
    torch.testing.assert_close(b.reshape(coarse, factor, 8, 2).sum(1), a, atol=1e-12, rtol=0)


def test_both_directions_and_empty_steps():
    """increment(t, s) = -increment(s, t), and nothing moves in no time."""
    path = BrownianPath((3, 2), 7, dtype=torch.float64)
    assert torch.equal(path.increment(0.9, 0.3), -path.increment(0.3, 0.9))
    assert float(path.increment(0.4, 0.4).abs().max()) == 0.0
    assert torch.equal(path.increment(0.0, 0.3), path.value(0.3))


def test_results_belong_to_the_caller():
    """Changing what was returned does not change the path."""
    path = BrownianPath((3, 2), 8)
    first = path.value(0.3)
    kept = first.clone()
    first.zero_()
    path.increment(0.0, 0.3).zero_()
    assert torch.equal(path.value(0.3), kept)


def test_scaling_of_the_interval():
    """The path on [a, b] is the one on [0, 1] times sqrt(b - a)."""
    unit, wide = BrownianPath((3, 2), 9, dtype=torch.float64), BrownianPath((3, 2), 9, 2.0, 18.0, dtype=torch.float64)
    torch.testing.assert_close(4 * unit.value(0.3), wide.value(2 + 16 * 0.3))


# -- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 2), (5, 1, 4, 5)])
def test_a_row_depends_on_its_own_seed(shape):
    """Alone, in another place, or among others: the same bits."""
    times = uniform(10) + [0.123]
    whole = BrownianPath(shape, [11, 12, 13, 14, 15])
    part = BrownianPath((2, *shape[1:]), [14, 12])
    for t in times:
        assert torch.equal(part.value(t), whole.value(t)[[3, 1]])
    assert not torch.equal(whole.value(0.5)[0], whole.value(0.5)[1])


def test_kinds_of_seed():
    """int, generator, RandomSource and None; the path is not the noise that the seed gives elsewhere."""
    one, two = BrownianPath((4, 2), 3), BrownianPath((4, 2), 3)
    assert torch.equal(one.value(0.7), two.value(0.7))
    assert not torch.equal(one.value(0.7), BrownianPath((4, 2), 4).value(0.7))
    made = [BrownianPath((4, 2), torch.Generator().manual_seed(1)).value(0.7) for _ in range(2)]
    assert torch.equal(*made)
    source = RandomSource([1, 2, 3, 4], "cpu", 4)
    assert not torch.equal(BrownianPath((4, 2), source).value(0.7), BrownianPath((4, 2), source).value(0.7))
    assert not torch.equal(BrownianPath((4, 2)).value(0.7), BrownianPath((4, 2)).value(0.7))
    assert not torch.allclose(one.value(1.0), RandomSource(3, "cpu", 4).normal((4, 2), torch.float32))


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    BrownianPath((4, 2), 1).increment(0.9, 0.1)
    BrownianPath((4, 2)).increment(0.9, 0.1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_errors():
    """Ends, times and seeds that make no sense are named."""
    for a, b in ((1.0, 1.0), (1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="finite a < b"):
            BrownianPath((2, 2), 0, a, b)
    path = BrownianPath((2, 2), 0, 0.0, 2.0)
    for t in (-0.1, 2.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"lives on \[0, 2\]"):
            path.value(t)
    with pytest.raises(ValueError, match="3 seeds for a batch of 2"):
        BrownianPath((2, 2), [1, 2, 3])
    with pytest.raises(TypeError, match="seed must be"):
        BrownianPath((2, 2), "one")
    assert BrownianPath((0, 2), []).value(0.3).shape == (0, 2)


# -- the tree --------------------------------------------------------------------------------------------------------


def test_splits_end_at_every_tick_count():
    """10 = 5 + 5, 5 = 2 + 3, 3 = 1 + 2, 2 = 1 + 1 in each decimal, then halves."""
    assert _left(TICKS) == 500 * UNIT
    widths = {500: 200, 300: 100, 200: 100, 100: 50, 50: 20, 30: 10, 20: 10, 10: 5, 5: 2, 3: 1, 2: 1}
    assert {k: _left(k * UNIT) // UNIT for k in widths} == widths
    assert _left(UNIT) == UNIT // 2
    assert _left(2) == 1


def test_splitmix_is_the_published_generator():
    """The first outputs of SplitMix64 from state 0 (n = 1, 2, 3)."""
    assert [_splitmix(0, n) for n in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("steps", [50, 100, 500, 1000])
def test_round_grids_cost_at_most_two_draws_a_step(steps):
    """The number of draws, which is what a step costs, does not grow with the number of steps."""
    path = BrownianPath((2, 2), 0, 1e-5, 1.0)
    draws, normal = [], path._normal
    path._normal = lambda node: draws.append(node) or normal(node)
    increments(path, uniform(steps, 1.0, 1e-5))
    assert len(draws) <= 2 * steps
    assert len(set(draws)) == len(draws)  # a sweep makes no node twice
    draws.clear()
    increments(path, uniform(steps, 0.99, 1e-5))  # a grid that meets no node
    assert len(draws) <= (23 - math.log2(steps)) * steps
