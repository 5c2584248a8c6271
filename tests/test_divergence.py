"""Trace estimators on matrices that are known: unbiased, with standard errors that are what they say."""

import math
import warnings

import pytest
import torch
from torch import nn

from scoresde import VPSDE, Exact, Hadamard, Hutchinson, HutchPlusPlus, ScoreNet, log_prob
from scoresde.likelihood.divergence import hadamard_rows, hadamard_size
from scoresde.rng import RandomSource, spawn

D = 12
N = 4000
ESTIMATORS = {
    "rademacher": Hutchinson(3),
    "gaussian": Hutchinson(3, "gaussian"),
    "forward": Hutchinson(3, mode="forward"),
    "hadamard": Hadamard(8, 2),
    "hutch++": HutchPlusPlus(6),
}


@pytest.fixture(scope="module")
def matrix():
    """A 12 x 12 matrix with neighbours that belong together and a few large directions; not symmetric."""
    g = torch.Generator().manual_seed(0)
    near = torch.exp(-(torch.arange(D)[:, None] - torch.arange(D)).abs() / 1.5).double()
    return near + 0.2 * torch.randn(D, D, generator=g, dtype=torch.float64)


def estimate(divergence, matrix, n=N, seed=0, event=(D,)):
    """(n, k) estimates of the trace of v(u) = A u + a nonlinear part whose trace at u = 0 is 0."""
    u = torch.zeros(n, *event, dtype=torch.float64)
    probes = divergence.probes(u.shape, u.dtype, RandomSource(seed, "cpu", n))

    def velocity(x):
        flat = x.flatten(1)
        return (flat @ matrix.T + flat**3).reshape(x.shape)

    v, traces = divergence(velocity, u, probes)
    assert v.shape == u.shape
    assert not v.requires_grad
    assert traces.dtype == torch.float64
    return traces


def test_exact(matrix):
    assert estimate(Exact(), matrix, n=3).flatten().tolist() == pytest.approx([float(matrix.trace())] * 3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_unbiased_with_calibrated_errors(name, matrix):
    """z-test of the mean over 4,000 draws; the errors that the scatter reports are those observed, within 10 %."""
    traces = estimate(ESTIMATORS[name], matrix)
    error = traces.mean(1) - matrix.trace()
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(N)
    reported = traces.var(1).mean() / traces.shape[1]
    assert math.sqrt(float(error.square().mean() / reported)) == pytest.approx(1.0, abs=0.1)


def test_orthogonal_rows_and_a_sketch_pay(matrix):
    """For as many products, both beat plain signs on this matrix; with all rows the trace is exact."""

    def spread(divergence):
        return float((estimate(divergence, matrix).mean(1) - matrix.trace()).std())

    assert spread(Hadamard(8, 1)) < 0.6 * spread(Hutchinson(8))
    low_rank = matrix[:, :1] @ matrix[:1]
    rank_one = [
        float((estimate(d, low_rank, n=500).mean(1) - low_rank.trace()).std())
        for d in (HutchPlusPlus(6), Hutchinson(6))
    ]
    assert rank_one[0] < 1e-9 < rank_one[1]
    assert spread(Hadamard(16, 1)) < 1e-12


@pytest.mark.parametrize("name", ESTIMATORS)
def test_images_and_seeds_per_sample(name, matrix):
    """Any event shape; an example's probes depend on its own seed alone."""
    divergence = ESTIMATORS[name]
    seeds = spawn(3, 4)
    whole = estimate(divergence, matrix, n=4, seed=seeds, event=(3, 2, 2))
    alone = estimate(divergence, matrix, n=1, seed=seeds[2:3], event=(3, 2, 2))
    torch.testing.assert_close(alone[0], whole[2], rtol=1e-12, atol=1e-12)


EVENTS = [(1,), (5,), (8,), (4, 4), (1, 6, 6), (1, 8, 8), (3, 4, 4), (2, 3, 3), (3, 5, 2)]


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_hadamard_rows(event):
    """All rows are signs, different, and orthogonal over the entries: the mean of w_p w_q is 0 for p != q. Row 0 is constant,
    row 1 a checkerboard."""
    size = hadamard_size(event)
    assert size >= math.prod(event)
    assert size & (size - 1) == 0
    rows = hadamard_rows(range(size), event)
    assert rows.shape == (size, *event)
    assert set(rows.unique().tolist()) <= {-1, 1}
    flat = rows.flatten(1).double()
    assert torch.equal(flat.T @ flat, size * torch.eye(math.prod(event), dtype=torch.float64))
    if math.prod(event) == size:
        assert torch.equal(flat @ flat.T, size * torch.eye(size, dtype=torch.float64))
    assert (rows[0] == 1).all()
    if size > 1:
        parity = sum(torch.meshgrid(*(torch.arange(n) for n in event), indexing="ij"))
        assert torch.equal(rows[1], 1 - 2 * (parity % 2))
    picked = [size - 1, 0, size // 2]
    assert torch.equal(hadamard_rows(picked, event), rows[picked])


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_all_hadamard_rows_give_the_trace(event):
    """In one place, or a few at a time along a sequence of places that visits them all: the sum has no error."""
    d, size = math.prod(event), hadamard_size(event)
    full = torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    traces = estimate(Hadamard(2 * size, 2), full, n=3, event=event)
    torch.testing.assert_close(traces, full.trace().expand(3, 2), rtol=1e-9, atol=1e-9)
    per_place = min(2, size)
    sequence = Hadamard(per_place, 1).probe_sequence((3, *event), torch.float64, RandomSource(0, "cpu", 3))
    probes = torch.cat([sequence(i) for i in range(size // per_place)], 1).flatten(2)
    forms = torch.einsum("bki,ij,bkj->bk", probes, full, probes)
    torch.testing.assert_close(forms.mean(1), full.trace().expand(3), rtol=1e-9, atol=1e-9)


def test_log_prob_with_each(full3, sde):
    """Every estimator through a solve: root mean square errors within 2.5 reported ones, small where the trace is exact."""
    model, x = full3.diffuse(sde), full3.sample(8, seed=2)
    truth = model.log_prob(x, sde.t_min)
    for name, divergence in (*ESTIMATORS.items(), ("all rows", Hadamard(4, 1))):
        got = log_prob(model, x, divergence=divergence, seed=1)
        error = float((got.value - truth).square().mean().sqrt())
        reported = 0.0 if name == "all rows" else float(got.stderr.square().mean().sqrt())
        assert error < 2.5 * reported + 0.05, name


def test_forward_mode_falls_back(matrix):
    """An operator without a forward derivative: a warning, and the same numbers in reverse mode."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.9))

        def forward(self, x, label):
            return self.weight * x + 0.01 * Cube.apply(x)

    model, x = ScoreNet(Net(), VPSDE(), "noise"), torch.zeros(2, 3) + 0.1
    forward = Hutchinson(2, mode="forward")
    with pytest.warns(UserWarning, match="going on in reverse mode"):
        got = log_prob(model, x, divergence=forward, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(got.value, log_prob(model, x, divergence=Hutchinson(2), seed=0).value)


def test_errors():
    for make in (
        lambda: Hadamard(8, 3),
        lambda: HutchPlusPlus(4),
        lambda: Hutchinson(2, mode="sideways"),
        lambda: Hutchinson(0),
    ):
        with pytest.raises(ValueError):
            make()
    with pytest.raises(ValueError, match="use fewer, or Exact"):
        Hadamard(64, 1).probes((2, 12), torch.float32, RandomSource(0, "cpu", 2))


def test_near_pixels_cancel_first_in_large_images():
    """At 3 x 32 x 32 the first eight rows already part every entry from its neighbours and from its other channels."""
    rows = hadamard_rows(range(8), (3, 32, 32)).double()
    for a, b in (
        (rows[:, :, :, 1:], rows[:, :, :, :-1]),
        (rows[:, :, 1:], rows[:, :, :-1]),
        (rows[:, 1:], rows[:, :-1]),
    ):
        assert ((a * b).mean(0) == 0).all()
