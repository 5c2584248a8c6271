"""Random numbers: explicit seeds, independence of batch and chunk, the global state left alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoresde import (
    METHODS,
    VPSDE,
    GaussianMixture,
    Hutchinson,
    bits_per_dim,
    denoising_loss,
    elbo,
    log_prob,
    sample,
)
from scoresde.rng import RandomSource, Streams, derive, generators, spawn


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


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9),
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


def bits(source):
    """The first 64 random bits of a generator."""
    return tuple(torch.randint(2**32, (2,), generator=source).tolist())


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_all_64_bits_count(seed, device):
    """Seeds that differ in their upper half alone draw other numbers; small ones draw torch's own."""
    draw = lambda s: RandomSource(s, device, 1).normal((1, 8), torch.float64)  # noqa: E731
    several = [seed + k * 2**32 for k in (0, 1, 2, 2**31, 2**32 - 1)]
    assert len({tuple(draw(s).flatten().tolist()) for s in several}) == len(several)
    expected = torch.randn(
        (1, 8), generator=torch.Generator(device).manual_seed(seed), dtype=torch.float64, device=device
    )
    assert torch.equal(draw(seed), expected)
    assert [g.initial_seed() for g in generators(several, device)] == several


def test_wide_seeds_fill_the_twister_of_numpy_too():
    """torch's layout of the state is what we take it for: NumPy's Mersenne Twister with the same words agrees."""
    (made,) = generators([2**40 + 3])
    words = made.get_state().numpy()[24:5016].view(np.uint64)
    assert int(words.max()) < 2**32
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": 624}}
    theirs = twister.random_raw(2000).astype(np.int64)
    ours = torch.randint(2**32, (1000,), generator=made).numpy()
    pairs = theirs.reshape(-1, 2)
    assert (ours == pairs[:, 0]).all() or (ours == pairs[:, 1]).all()  # it draws two words for a range as wide as this


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_fifty_thousand_streams_differ(seed):
    """No two of 50,000 spawned seeds start alike (of 32 bits, 0.3 pairs would be expected to), nor do neighbouring ones."""
    seeds = spawn(seed, 50_000)
    assert len({bits(g) for g in generators(seeds)}) == 50_000
    near = generators(list(range(2**33, 2**33 + 2000)))
    assert len({bits(g) for g in near}) == 2000


def test_wide_seeds_are_uniform():
    """Neighbouring wide seeds give independent uniform numbers: mean, variance and correlation of 20,000 first draws."""
    u = RandomSource(list(range(2**40, 2**40 + 20_000)), "cpu", 20_000).uniform((20_000, 2), torch.float64)
    assert float((u.mean(0) - 0.5).abs().max()) < 5 * (1 / 12 / 20_000) ** 0.5
    assert abs(float(torch.corrcoef(u.T)[0, 1])) < 5 / 20_000**0.5
    assert abs(float(torch.corrcoef(torch.stack([u[1:, 0], u[:-1, 0]]))[0, 1])) < 5 / 20_000**0.5


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**63), 10**30, np.int64(-5)])
def test_seeds_that_do_not_fit_are_refused(seed):
    """Alone, one per sample, spawned from, and by the public functions."""
    for call in (
        lambda: RandomSource(seed, "cpu", 1),
        lambda: RandomSource([3, seed], "cpu", 2),
        lambda: RandomSource(seed, "cpu", 1, salt=3),
        lambda: Streams(seed, "cpu", 1),
        lambda: spawn(seed, 2),
        lambda: sample(VPModel, (1, 2), steps=1, seed=seed),
    ):
        with pytest.raises(ValueError, match=r"2\^64"):
            call()


VPModel = GaussianMixture.isotropic([[0.0, 0.0]], 1.0).diffuse(VPSDE())


@pytest.mark.parametrize("method", METHODS)
def test_one_generator_per_sample(method):
    """As in diffusers: row i depends on the i-th generator alone, which is advanced."""
    make = lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]  # noqa: E731
    steps = None if METHODS[method]().nfe_per_step is None else 4
    draw = lambda gs: sample(VPModel, (len(gs), 2), method=method, steps=steps, seed=gs)  # noqa: E731
    given = make(3, 4, 5)
    whole = draw(given)
    assert not torch.equal(draw(given), whole)
    torch.testing.assert_close(draw(make(4, 5)), whole[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(tuple(make(3))), whole[:1], rtol=0, atol=1e-5)


def test_one_generator_per_example_elsewhere(ring8):
    """Likelihoods with probes, losses and exact draws take them too."""
    make = lambda: [torch.Generator().manual_seed(n) for n in (3, 4)]  # noqa: E731
    x = ring8.sample(2, seed=0)
    for call in (
        lambda s: log_prob(VPModel, x, divergence=Hutchinson(2), seed=s, rtol=1e-2, atol=1e-2).value,
        lambda s: elbo(VPModel, x, seed=s).value,
        lambda s: denoising_loss(VPModel, x, time_sampling="uniform", seed=s),
        lambda s: ring8.sample(2, seed=s),
        lambda s: Streams(s, "cpu", 2).source(None, 1).normal((2, 3), torch.float64),
    ):
        given = make()
        before = [g.get_state() for g in given]
        first = call(given)
        assert not any(torch.equal(g.get_state(), b) for g, b in zip(given, before, strict=True))
        assert torch.equal(first, call(make()))


def test_wrong_lists_of_generators():
    """Mixed with integers, too few, of another device."""
    g = torch.Generator()
    for mixed in ([g, 1], [1, g]):
        with pytest.raises(TypeError, match="alone"):
            RandomSource(mixed, "cpu", 2)
    with pytest.raises(ValueError, match="got 2 seeds for a batch of 3"):
        RandomSource([g, g], "cpu", 3)
    with pytest.raises(ValueError, match="generator lives on cpu"):
        RandomSource([g], "meta", 1)


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
