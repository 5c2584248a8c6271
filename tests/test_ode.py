"""The Runge-Kutta engine on problems that know nothing of diffusion."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from scoresde.ode import MAX_NFE, NOT_FINITE, OK, STATUS_TEXT, STEP_TOO_SMALL, TABLEAUX, UNRESOLVED, solve

METHODS = list(TABLEAUX)


def lotka(t, y, rows=None):
    """Lotka-Volterra with a seasonal term: nonlinear and not autonomous."""
    a, b = y[:, 0], y[:, 1]
    return torch.stack([a * (1.5 - b) + 0.3 * torch.cos(3 * t), b * (a - 3)], 1), None


Y0 = torch.tensor([[1.0, 1.0], [2.0, 0.5], [0.7, 3.0], [4.0, 1.2]], dtype=torch.float64)


def reference(y0, t0, t1):
    """DOP853 of scipy, one problem at a time."""

    def f(t, y):
        return lotka(torch.tensor([t], dtype=torch.float64), torch.from_numpy(y)[None])[0][0].numpy()

    return np.stack([solve_ivp(f, (t0, t1), y.numpy(), "DOP853", rtol=1e-12, atol=1e-13).y[:, -1] for y in y0])


@pytest.mark.parametrize("name", METHODS)
def test_tableau_consistency(name):
    """Weights sum to 1, c are the row sums, the error weights sum to 0, and the pair is first same as last."""
    t = TABLEAUX[name]
    assert sum(t.a[-1]) == pytest.approx(1, abs=1e-14)
    for c, row in zip(t.c, t.a, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-13)
    assert sum(t.e) == pytest.approx(0, abs=1e-14)
    assert len(t.e) == len(t.c) == len(t.a) == t.stages
    assert all(len(row) == i for i, row in enumerate(t.a))
    assert t.c[-1] == 1.0


@pytest.mark.parametrize("name", METHODS)
def test_tableau_order_conditions(name):
    """b meets all conditions of rooted trees up to order 4 and the quadrature ones to its order; b - e to one less."""
    t, s = TABLEAUX[name], TABLEAUX[name].stages
    a = np.array([list(row) + [0.0] * (s - len(row)) for row in t.a])
    b, c = np.array(list(t.a[-1]) + [0.0]), np.array(t.c)
    conditions = {  # Hairer, Norsett & Wanner 1993, table II.2.1
        1: [(b.sum(), 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        4: [(b @ c**3, 1 / 4), (b @ (c * (a @ c)), 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
        5: [(b @ c**4, 1 / 5), (b @ a @ a @ a @ c, 1 / 120), (b @ (a @ c) ** 2, 1 / 20)],
    }
    for order in range(1, t.order + 1):
        for got, expected in conditions[order]:
            assert got == pytest.approx(expected, abs=1e-12)
    e = np.array(t.e)
    for order in range(1, t.order):
        assert e @ c ** (order - 1) == pytest.approx(0, abs=1e-12)
    assert abs(e @ c ** (t.order - 1)) > 1e-5  # the embedded solution is of lower order: there is an estimate


@pytest.mark.parametrize("name", METHODS)
def test_tableau_converges_at_its_order(name):
    """Fixed steps on a nonlinear problem: slope of the error, for the solution and for its estimate."""
    table = TABLEAUX[name]
    truth = torch.from_numpy(reference(Y0, 0.0, 1.0))
    errors, counts = [], [20, 40, 80]
    for n in counts:
        y, h = Y0.clone(), 1 / n
        for i in range(n):
            k = []
            for c, row in zip(table.c, table.a, strict=True):
                stage = y + h * sum((w * v for w, v in zip(row, k, strict=True)), torch.zeros_like(y))
                k.append(lotka(torch.full((4,), (i + c) * h, dtype=torch.float64), stage)[0])
            y = stage
        errors.append(float((y - truth).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert table.order - 0.3 < slope < table.order + 1.3


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ends", [(0.0, 3.0), (3.0, 0.5)], ids=["forward", "backward"])
def test_agrees_with_dop853(name, ends):
    """Errors follow the tolerance, in both directions, and the time reached is the end exactly."""
    truth, previous = torch.from_numpy(reference(Y0, *ends)), math.inf
    for tol in (1e-4, 1e-6, 1e-8):
        got = solve(lotka, Y0, *ends, rtol=tol, atol=tol, method=name)
        error = float(((got.y - truth) / (1 + truth.abs())).abs().max())
        assert error < 100 * tol
        assert error < 0.3 * previous
        assert (got.status == OK).all()
        assert (got.t == ends[1]).all()
        previous = error


def test_there_and_back():
    """Backward from the end of a forward solve is where it began."""
    there = solve(lotka, Y0, 0.0, 2.0, rtol=1e-9, atol=1e-9).y
    torch.testing.assert_close(solve(lotka, there, 2.0, 0.0, rtol=1e-9, atol=1e-9).y, Y0, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    t0=st.floats(-3, 3),
    t1=st.floats(-3, 3),
    method=st.sampled_from(METHODS),
    tol=st.sampled_from([1e-2, 1e-5, 1e-7]),
    stiffness=st.floats(-30, 5),
)
def test_never_evaluated_outside_the_interval(t0, t1, method, tol, stiffness):
    """No stage of any step leaves [t0, t1], not by a rounding."""
    seen = []

    def f(t, y, rows):
        seen.append((float(t.min()), float(t.max())))
        return stiffness * (t1 > t0 or -1) * (y - torch.cos(t)[:, None]), None

    got = solve(f, torch.tensor([[1.0], [-2.0]], dtype=torch.float64), t0, t1, rtol=tol, atol=tol, method=method)
    assert (got.t == t1).all()
    if seen:
        assert min(s[0] for s in seen) >= min(t0, t1)
        assert max(s[1] for s in seen) <= max(t0, t1)


@pytest.mark.parametrize("name", METHODS)
def test_rows_do_not_feel_their_batch(name):
    """A row's result, evaluations and status are the same alone, in any batch and in any order."""
    y0 = torch.cat([Y0, 3 * Y0])
    whole = solve(lotka, y0, 0.0, 2.0, method=name)
    assert len(set(whole.nfe.tolist())) > 1  # they do take different numbers of steps
    flipped = solve(lotka, y0.flip(0), 0.0, 2.0, method=name)
    assert torch.equal(flipped.nfe.flip(0), whole.nfe)
    torch.testing.assert_close(flipped.y.flip(0), whole.y, rtol=1e-12, atol=1e-12)
    for i in range(8):
        alone = solve(lotka, y0[i : i + 1], 0.0, 2.0, method=name)
        assert int(alone.nfe) == int(whole.nfe[i])
        torch.testing.assert_close(alone.y[0], whole.y[i], rtol=1e-12, atol=1e-12)


def test_finished_rows_are_not_evaluated(device):
    """The sum of rows over all calls is the sum of nfe on a CPU: nothing is spent on examples that have finished."""
    calls = []

    def f(t, y, rows):
        calls.append(rows.numel())
        return -rates.to(y.device)[rows, None] * y, None

    rates = torch.tensor([0.1, 3.0, 200.0], dtype=torch.float64)
    got = solve(f, torch.ones(3, 1, dtype=torch.float64, device=device), 0.0, 1.0)
    torch.testing.assert_close(got.y[:, 0].cpu(), torch.exp(-rates), rtol=1e-3, atol=1e-4)
    assert got.nfe[0] < got.nfe[1] < got.nfe[2]
    if device == "cpu":
        assert sum(calls) == int(got.nfe.sum())


@pytest.mark.parametrize("event", [(1,), (2, 3), (1, 4, 4), (1, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_event_shape_and_dtype(event, dtype):
    """y' = -y to exp(-1) for states of any rank; the dtype is kept, time stays float64."""
    y0 = torch.ones(3, *event, dtype=dtype)
    got = solve(lambda t, y, rows: (-y, None), y0, 0.0, 1.0)
    assert got.y.dtype == dtype
    assert got.t.dtype == torch.float64
    torch.testing.assert_close(got.y, y0 * math.exp(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["everywhere", "after half", "from the second slope on"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_a_status_of_its_rows_and_no_hang(where, bad):
    """Rows whose right-hand side is not finite get NOT_FINITE and stop where it begins; their neighbours finish."""
    calls = [0]

    def f(t, y, rows):
        calls[0] += 1
        wrong = (rows == 1) | (rows == 2)
        if where == "after half":
            wrong &= t > 0.5
        elif where != "everywhere":
            wrong &= t > 0
        return torch.where(wrong[:, None], bad, -y), None

    got = solve(f, torch.ones(4, 2, dtype=torch.float64), 0.0, 1.0)
    assert calls[0] < 1000
    assert got.status.tolist() == [OK, NOT_FINITE, NOT_FINITE, OK]
    torch.testing.assert_close(
        got.y[[0, 3]], torch.full((2, 2), math.exp(-1), dtype=torch.float64), rtol=1e-4, atol=1e-4
    )
    assert torch.isfinite(got.y).all()  # where it stopped, not what it met
    begins = 0.5 if where == "after half" else 0.0
    assert float(got.t[1]) == pytest.approx(begins, abs=1e-6)


def test_nan_in_the_quadrature_alone():
    """NaN in r, not in f, is found as well."""
    got = solve(
        lambda t, y, rows: (-y, torch.where(t > 0.5, math.nan, t)[:, None]), torch.ones(2, 1).double(), 0.0, 1.0
    )
    assert got.status.tolist() == [NOT_FINITE] * 2


def test_blow_up_ends_with_a_status():
    """y' = y^2 from 1 has no solution beyond t = 1: a status there, not a loop; the tame row finishes."""
    y0 = torch.tensor([[1.0], [0.1]], dtype=torch.float64)
    got = solve(lambda t, y, rows: (y**2, None), y0, 0.0, 2.0)
    assert int(got.status[0]) in (STEP_TOO_SMALL, MAX_NFE, NOT_FINITE)
    assert float(got.t[0]) == pytest.approx(1, abs=1e-3)
    assert int(got.status[1]) == OK
    assert float(got.y[1]) == pytest.approx(1 / 8, rel=1e-3)
    assert set(STATUS_TEXT) == {OK, MAX_NFE, STEP_TOO_SMALL, NOT_FINITE, UNRESOLVED}


@pytest.mark.parametrize("budget", [1, 30, 200])
def test_max_nfe_stops_with_a_partial_result(budget):
    """A stiff row stops near its budget, with y right at the t it reached; the other rows are whole."""
    rates = torch.tensor([1.0, 1e5], dtype=torch.float64)

    def f(t, y, rows):
        return -rates[rows, None] * (y - torch.cos(t)[:, None]), None

    got = solve(f, torch.ones(2, 1, dtype=torch.float64), 0.0, 1.0, max_nfe=budget, rtol=1e-3, atol=1e-3)
    assert int(got.status[1]) == MAX_NFE
    assert budget <= int(got.nfe[1]) < budget + 8
    assert 0 <= float(got.t[1]) < 1
    assert float(got.y[1]) == pytest.approx(math.cos(float(got.t[1])), abs=1e-3)
    if budget == 200:
        assert int(got.status[0]) == OK


@pytest.mark.parametrize("name", METHODS)
def test_quadrature(name):
    """q integrates r(t, y) in float64 beside a float32 state, m numbers per example, to its own tolerance."""

    def f(t, y, rows):
        return -y, torch.stack([y[:, 0].double(), torch.sin(5 * t), t**2 * (1 + rows)], 1)

    y0 = torch.tensor([[1.0], [2.0]])
    got = solve(f, y0, 0.0, 2.0, rtol=1e-6, atol=1e-6, q_tol=1e-6, method=name)
    decay = 1 - math.exp(-2)
    expected = [[decay, (1 - math.cos(10)) / 5, 8 / 3], [2 * decay, (1 - math.cos(10)) / 5, 16 / 3]]
    assert got.q.dtype == torch.float64
    torch.testing.assert_close(got.q, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    back = solve(f, y0, 2.0, 0.0, rtol=1e-6, atol=1e-6, q_tol=1e-6, method=name)
    assert float(back.q[0, 1]) == pytest.approx(-expected[0][1], abs=1e-5)


def test_quadrature_controls_the_step():
    """A rough r under a constant y: the error of q, not of y, sets the steps."""

    def f(t, y, rows):
        return torch.zeros_like(y), torch.sin(80 * t)[:, None]

    errors = []
    for tol in (1e-2, 1e-6):
        got = solve(f, torch.ones(1, 1, dtype=torch.float64), 0.0, 1.0, q_tol=tol)
        errors.append(abs(float(got.q) - (1 - math.cos(80)) / 80))
    assert errors[1] < 1e-4
    assert errors[1] < errors[0]


def test_empty_batch_and_empty_interval():
    """Nothing to do: the state comes back, no evaluation is made."""

    def never(t, y, rows):
        raise AssertionError("evaluated")

    got = solve(never, torch.zeros(0, 3), 0.0, 1.0)
    assert got.y.shape == (0, 3)
    assert got.status.shape == got.nfe.shape == got.t.shape == (0,)
    got = solve(never, Y0, 0.5, 0.5)
    assert torch.equal(got.y, Y0)
    assert (got.status == OK).all()


def test_the_initial_state_is_not_written_to():
    """The caller's tensor stays as it was."""
    y0 = Y0.clone()
    solve(lotka, y0, 2.0, 0.0)
    assert torch.equal(y0, Y0)


def test_constant_and_zero_slopes():
    """f = 0 and f = const are solved exactly, in few evaluations."""
    got = solve(lambda t, y, rows: (torch.zeros_like(y), None), Y0, 0.0, 1.0)
    assert torch.equal(got.y, Y0)
    got = solve(lambda t, y, rows: (torch.ones_like(y), None), torch.zeros(1, 2, dtype=torch.float64), 0.0, 1.0)
    torch.testing.assert_close(got.y, torch.ones(1, 2, dtype=torch.float64), rtol=1e-12, atol=0)
    assert int(got.nfe) < 100


@pytest.mark.parametrize("name", ["rtol", "atol", "q_tol"])
@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf, "tight"])
def test_bad_tolerances(name, value):
    """Tolerances have to be positive numbers."""
    with pytest.raises(ValueError, match=name):
        solve(lotka, Y0, 0.0, 1.0, **{name: value})


def test_bad_method_and_budget():
    """Unknown methods are listed against; the budget is an integer of at least one."""
    with pytest.raises(ValueError, match="bosh3, dopri5, tsit5"):
        solve(lotka, Y0, 0.0, 1.0, method="rk4")
    with pytest.raises(ValueError, match="max_nfe"):
        solve(lotka, Y0, 0.0, 1.0, max_nfe=0)
    with pytest.raises(TypeError, match="max_nfe"):
        solve(lotka, Y0, 0.0, 1.0, max_nfe=1e4)
