"""Random numbers: explicit seeds, independence of batch and chunk, the global state left alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoresde import METHODS, VPSDE, Hutchinson, bits_per_dim, denoising_loss, log_prob, sample
from scoresde.rng import RandomSource, derive, spawn


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63), n=st.integers(0, 20), cut=st.integers(0, 20))
def test_spawned_seeds_do_not_depend_on_chunks(seed, n, cut):
    """A stream cut anywhere is the same stream, and its seeds fit a 64-bit generator."""
    cut = min(cut, n)
    whole = spawn(seed, n)
    assert whole == spawn(seed, cut) + spawn(seed, n - cut, cut)
    assert len(set(whole)) == n
    assert all(0 <= s < 2**63 for s in whole)


def test_derive_depends_on_every_number():
    """Neighbouring and permuted arguments give different seeds."""
    seeds = {derive(a, b, c) for a in range(6) for b in range(6) for c in range(6)}
    assert len(seeds) == 216
    assert derive(-1) == derive(2**64 - 1)


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=9),
    cut=st.integers(0, 9),
)
def test_rows_depend_on_their_seed_alone(seeds, cut):
    """One seed per sample: any chunking gives the same rows, through several draws."""
    whole, cut = RandomSource(seeds, "cpu", len(seeds)), min(cut, len(seeds))
    parts = [RandomSource(s, "cpu", len(s)) for s in (seeds[:cut], seeds[cut:])]
    for kind, event in (("normal", (3,)), ("uniform", (2, 2)), ("normal", (1, 4))):
        expected = getattr(whole, kind)((len(seeds), *event), torch.float64)
        got = [
            getattr(p, kind)((n, *event), torch.float64) for p, n in zip(parts, (cut, len(seeds) - cut), strict=True)
        ]
        assert torch.equal(torch.cat(got), expected)


def test_kinds_of_seed_lists():
    """Lists, tuples, arrays and tensors of integers mean the same."""
    expected = RandomSource([3, 4], "cpu", 2).normal((2, 5), torch.float32)
    for seeds in ((3, 4), np.array([3, 4]), torch.tensor([3, 4])):
        assert torch.equal(RandomSource(seeds, "cpu", 2).normal((2, 5), torch.float32), expected)
    assert torch.equal(
        RandomSource(np.int64(3), "cpu", 2).normal((2, 5), torch.float32),
        RandomSource(3, "cpu", 2).normal((2, 5), torch.float32),
    )


def test_distributions():
    """normal is N(0, 1), uniform is U[0, 1): first moments of a large draw."""
    z = RandomSource(0, "cpu", 1).normal((1, 100_000), torch.float64)
    u = RandomSource(0, "cpu", 1).uniform((1, 100_000), torch.float64)
    assert abs(float(z.mean())) < 5 / 100_000**0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / 100_000) ** 0.5
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert 0 <= float(u.min()) < float(u.max()) < 1


def test_wrong_seeds():
    """The number and the kind of seeds are checked."""
    with pytest.raises(ValueError, match="got 2 seeds for a batch of 3"):
        RandomSource([1, 2], "cpu", 3)
    for seed in ("7", 1.5, True, object()):
        with pytest.raises(TypeError, match="seed must be"):
            RandomSource(seed, "cpu", 1)
    with pytest.raises(ValueError, match="generator lives on cpu"):
        RandomSource(torch.Generator(), "meta", 1)
    with pytest.raises(ValueError, match="asked for 3 rows"):
        RandomSource([1, 2], "cpu", 2).normal((3, 1), torch.float32)


@pytest.mark.parametrize("seeds", [[0.2, 0.7], torch.tensor([0.2, 0.7]), np.array([0.2, 0.7])])
def test_seeds_that_are_no_integers(seeds):
    """Fractions are refused: cut to integers, both of these would be seed 0, and both samples the same."""
    with pytest.raises(TypeError, match="seed must be"):
        RandomSource(seeds, "cpu", 2)


def test_generator_is_used_and_advanced(ring8):
    """A generator is drawn from where it stands: a second call differs, a rewound one repeats."""
    model, g = ring8.diffuse(VPSDE()), torch.Generator().manual_seed(9)
    state = g.get_state()
    first = sample(model, (4, 2), method="euler", steps=3, seed=g)
    second = sample(model, (4, 2), method="euler", steps=3, seed=g)
    assert not torch.equal(first, second)
    g.set_state(state)
    assert torch.equal(first, sample(model, (4, 2), method="euler", steps=3, seed=g))


def test_no_seed_is_fresh_entropy(ring8):
    """seed=None never repeats."""
    model = ring8.diffuse(VPSDE())
    a, b = (sample(model, (4, 2), method="ddim", steps=2) for _ in range(2))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("seed", [None, 0, "rows"])
def test_global_random_state_is_untouched(ring8, image16, seed):
    """Sampling, likelihood, bits/dim, loss and exact draws neither read nor change torch's and NumPy's global state."""
    model = ring8.diffuse(VPSDE())
    rows = [1, 2, 3] if seed == "rows" else seed
    x = ring8.sample(3, seed=0)

    def everything():
        out = [sample(model, (3, 2), method=m, steps=2, seed=rows) for m in METHODS]
        out.append(log_prob(model, x, divergence=Hutchinson(2), seed=rows, rtol=1e-2, atol=1e-2).value)
        out.append(denoising_loss(model, x, seed=rows))
        out.append(ring8.sample(3, seed=rows))
        pixels = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8)
        out.append(bits_per_dim(image16.diffuse(VPSDE()), pixels, seed=0, rtol=0.1, atol=0.1).per_example)
        return out

    torch.manual_seed(0)
    np.random.seed(0)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = everything()
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()
    torch.manual_seed(1)
    np.random.seed(1)
    if seed is not None:
        for a, b in zip(first, everything(), strict=True):
            assert torch.equal(a, b)


def test_sample_in_chunks(ring8, device):
    """Chunks of one stream of seeds join to the same samples, whatever their size."""
    model, seeds = ring8.diffuse(VPSDE()).to(device), spawn(11, 10)
    whole = sample(model, (10, 2), method="ancestral", steps=20, seed=seeds)
    parts = [
        sample(model, (len(s), 2), method="ancestral", steps=20, seed=s) for s in (seeds[:3], seeds[3:4], seeds[4:])
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
