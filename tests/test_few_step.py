"""method="auto" and `tune`: evaluations, exact cases, weights against quadrature, errors against the exact flow, faults."""

import math
import random

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from scoresde import EDMSDE, VESDE, VPSDE, GaussianMixture, NonFiniteError, ScoreModel, ScoreNet, sample, tune
from scoresde.grids import karras, uniform_log_snr
from scoresde.nets import MLP
from scoresde.rng import RandomSource
from scoresde.samplers import FewStep, Multistep, ProbabilityFlow, State, Trajectory, run
from scoresde.samplers.few_step import integrals, nodes, rule_weights, tau, untuned
from scoresde.store import load_model, load_samplers, save_model, save_sampler

PROCESSES = [VPSDE(t_min=1e-3), VESDE(), EDMSDE()]
QUICK = dict(starts=64, held_out=64, teacher_nfe=60, iterations=5, jacobian_starts=32)


class Counting(ScoreModel):
    """Another model, with the number of its evaluations and of the rows in them."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sde, self.sigma_data, self.event_shape = model, model.sde, model.sigma_data, model.event_shape
        self.calls = self.rows = 0

    def denoise(self, x, t, cond=None):
        self.calls += 1
        self.rows += len(x)
        return self.model.denoise(x, t, cond)


class Shrink(nn.Module):
    """An elementwise noise prediction that is not linear, the same bits for a row in any batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.9))

    def forward(self, x, label):
        return self.weight * x / (1 + 0.1 * x * x)


def starts(sde, n=128, seed=0):
    """Draws from the prior in two dimensions, float64."""
    g = torch.Generator().manual_seed(seed)
    return sde.prior_std * torch.randn(n, 2, generator=g, dtype=torch.float64)


@pytest.fixture(scope="module")
def flows(ring8):
    """Model, starts and their exact ends for every process."""
    out = {}
    for sde in PROCESSES:
        model, x = ring8.diffuse(sde), starts(sde)
        exact = sample(model, x.shape, method=ProbabilityFlow(1e-9, 1e-9), x_init=x, grid=[sde.t_max, sde.t_min])
        out[type(sde).__name__] = model, x, exact
    return out


def distances(model, x, exact, method, **options):
    """Distance of every endpoint from the exact one."""
    return (sample(model, x.shape, method=method, x_init=x, **options) - exact).norm(dim=1)


# -- evaluations, grids and starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 10, 13, 20, 40])
def test_steps_are_evaluations(steps, ring8, sde):
    """Exactly `steps` evaluations on every process; nfe= says the same, and so does the loop on the sampler's own times."""
    model, x = Counting(ring8.diffuse(sde)), starts(sde, 4)
    got = sample(model, x.shape, method="auto", steps=steps, x_init=x)
    assert model.calls == steps
    assert torch.isfinite(got).all()
    assert torch.equal(sample(model, x.shape, method="auto", nfe=steps, x_init=x), got)
    times = FewStep().times(model, steps)
    assert len(times) in (steps + 1, steps + 2)
    assert (times[1:] < times[:-1]).all()
    assert (float(times[0]), float(times[-1])) == (model.sde.t_max, model.sde.t_min)
    model.calls = 0
    assert torch.equal(run(FewStep(), model, x, times, RandomSource(0, "cpu", 4)), got)
    assert model.calls == steps
    model.calls = 0
    given = sample(model, x.shape, method="auto", grid=times, x_init=x)  # the caller's grid, whatever its times
    assert model.calls == len(times) - 1
    assert torch.equal(given, sample(model, x.shape, method=Multistep("angle", 3), grid=times, x_init=x))


def test_so_many_steps_that_no_move_is_free(ring8):
    """With 400 steps of VP the first node stands at t_max itself: 400 intervals and 400 evaluations."""
    model = Counting(ring8.diffuse(VPSDE()))
    assert len(FewStep().times(model, 400)) == 401
    assert torch.isfinite(sample(model, (2, 2), method="auto", steps=400, seed=0)).all()
    assert model.calls == 400


def test_ends_at_sigma_zero(ring8):
    """t_min = 0 of VP is reached without an evaluation there."""
    sde = VPSDE(t_min=0.0)
    x = starts(sde)
    near = sample(ring8.diffuse(VPSDE(t_min=1e-5)), x.shape, method="auto", steps=20, x_init=x)
    for steps in (1, 5, 20):
        got = sample(ring8.diffuse(sde), x.shape, method="auto", steps=steps, x_init=x)
        assert torch.isfinite(got).all()
    assert float((got - near).norm(dim=1).median()) < 5e-3


def test_a_grid_of_the_user(flows):
    """On any other grid every interval costs an evaluation, and the solve still converges to the flow."""
    model, x, exact = flows["VPSDE"]
    counting = Counting(model)
    for grid in (uniform_log_snr, karras):
        coarse, fine = (distances(counting, x, exact, "auto", grid=grid, steps=n).median() for n in (20, 80))
        assert fine < 2e-3
        assert fine < coarse / 8
    assert counting.calls == 2 * (20 + 80)
    times = [1.0, 0.7, 0.5, 0.3, 0.1, 0.02, 1e-3]
    record = Trajectory()
    sample(counting, x.shape, method="auto", grid=times, x_init=x, trajectory=record)
    assert record.times == times


def test_an_earlier_start(flows):
    """t_max draws the start from N(0, alpha^2 c^2 + sigma^2) there, and the steps go on from it."""
    model, _, _ = flows["VPSDE"]
    sde, t = model.sde, 0.6
    scale = math.hypot(float(sde.alpha(t)) * model.sigma_data, float(sde.sigma(t)))
    x = (scale * RandomSource(3, "cpu", 16).normal((16, 2), torch.float32)).double()
    exact = sample(model, x.shape, method=ProbabilityFlow(1e-8, 1e-8), x_init=x, grid=[t, sde.t_min])
    record = Trajectory()
    got = sample(model, (16, 2), method="auto", steps=30, t_max=t, seed=3, trajectory=record)
    assert record.times[0] == t
    assert torch.equal(record.states[0].double(), x)
    assert float((got - exact).norm(dim=1).median()) < 1e-3
    again = sample(model, (16, 2), method="auto", steps=30, t_max=t, x_init=x)
    torch.testing.assert_close(again.float(), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("event", [(5,), (3, 4, 6), (1, 2, 3, 4)], ids=str)
def test_networks_and_shapes(event, sde):
    """A float32 network on any shape, its result in float32."""
    x = sample(ScoreNet(Shrink(), sde, "edm"), (3, *event), method="auto", steps=4, seed=0)
    assert x.shape == (3, *event)
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()


def test_one_seed_per_sample():
    """A sample is the same bits alone and in a batch."""
    model = ScoreNet(Shrink(), VPSDE())
    seeds = [5, 6, 7]
    together = sample(model, (3, 4), method="auto", steps=6, seed=seeds)
    for i, seed in enumerate(seeds):
        assert torch.equal(sample(model, (1, 4), method="auto", steps=6, seed=[seed])[0], together[i])
    assert len({tuple(row) for row in together.tolist()}) == 3


class Pulled(nn.Module):
    """A denoiser between two points at distance 1 from a centre, which is the condition."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=dtype))

    def forward(self, x, label, cond):
        return self.scale * torch.tanh(2 * x - cond) + cond


def test_conditions_reach_the_network():
    """Each row is drawn under its own condition."""
    model = ScoreNet(Pulled(), VPSDE(), "denoise")
    cond = torch.tensor([[0.0], [0.5], [-2.0]])
    together = sample(model, (3, 2), method="auto", steps=5, seed=[1, 2, 3], cond=cond)
    for i in range(3):
        alone = sample(model, (1, 2), method="auto", steps=5, seed=[i + 1], cond=cond[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])
    assert not torch.allclose(together, sample(model, (3, 2), method="auto", steps=5, seed=[1, 2, 3], cond=-cond))


# -- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [5, 8, 10, 20])
@pytest.mark.parametrize("process", ["VPSDE", "VESDE", "EDMSDE"])
def test_smaller_error_than_the_usual_methods(process, nfe, flows):
    """Mean and median distance from the exact ends are below half of dpm++2m's, unipc2's and heun's at equal cost, on the grid
    that these are published with, and smaller than theirs on our own grids."""
    problem = flows[process]
    own = distances(*problem, "auto", nfe=nfe)
    for method in ("dpm++2m", "unipc2", "heun"):
        other = distances(*problem, method, nfe=nfe, denoise_final=method == "heun" and nfe % 2 == 1)
        published = distances(*problem, method, nfe=nfe, grid=karras, denoise_final=method == "heun" and nfe % 2 == 1)
        assert own.mean() < published.mean() / 2
        assert own.median() < published.median() / 2
        assert own.mean() < other.mean()
        assert own.median() < other.median()


@pytest.mark.parametrize("process", ["VPSDE", "VESDE", "EDMSDE"])
def test_converges_to_the_flow(process, flows):
    """At 100 evaluations the median distance is below 1e-5, and from 50 on it falls at third order at least."""
    fifty, hundred = (float(distances(*flows[process], "auto", steps=n).median()) for n in (50, 100))
    assert hundred < 1e-5
    assert hundred < fifty / 6


@pytest.mark.parametrize("std", [0.05, 0.5, 3.0])
def test_gaussian_data_in_one_step(std, sde):
    """Centred Gaussian data of the model's own sigma_data: one evaluation lands on the exact flow, x scaled."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], std).diffuse(sde)
    assert model.sigma_data == pytest.approx(std)
    x = starts(sde, 8)
    ends = [math.hypot(float(sde.alpha(t)) * std, float(sde.sigma(t))) for t in (sde.t_max, sde.t_min)]
    for steps in (1, 7):
        got = sample(model, (8, 2), method="auto", steps=steps, x_init=x)
        torch.testing.assert_close(got, x * ends[1] / ends[0], rtol=1e-9, atol=1e-12)
    wrong = sample(model, (8, 2), method=FewStep(c=2 * std), steps=1, x_init=x)
    assert not torch.allclose(wrong, x * ends[1] / ends[0], rtol=1e-3)


def test_the_mean_of_the_data(sde):
    """FewStep(mean=...) is as exact for Gaussian data away from zero."""
    mean = torch.tensor([0.8, -0.3], dtype=torch.float64)
    model = GaussianMixture.isotropic(mean[None], 0.4).diffuse(sde)
    x = starts(sde, 8)
    t, s = sde.t_max, sde.t_min
    scale = math.hypot(float(sde.alpha(s)) * 0.4, float(sde.sigma(s))) / math.hypot(
        float(sde.alpha(t)) * 0.4, float(sde.sigma(t))
    )
    expected = float(sde.alpha(s)) * mean + scale * (x - float(sde.alpha(t)) * mean)
    got = sample(model, (8, 2), method=FewStep(mean=mean), steps=3, x_init=x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


# -- nodes and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("ends", [(150.0, 20.0), (1.3, 0.2), (0.05, 1e-5)])
def test_integrals_against_quadrature(c, ends):
    """Each Lagrange polynomial in tau, integrated over theta by adaptive quadrature; together they give the angle."""
    knots = np.array([math.inf, 90.0 * c, 2.0 * c, 0.3 * c])
    values = tau(knots, 2 * c)
    assert values[0] == 1.0
    low, high = (math.atan(r / c) for r in ends[::-1])

    def basis(theta, j):
        v = float(tau(np.array(c * math.tan(theta)), 2 * c))
        return math.prod((v - values[i]) / (values[j] - values[i]) for i in range(4) if i != j)

    got = integrals(*ends, knots, c, 2 * c)
    for j in range(4):
        exact = -quad(basis, low, high, args=(j,), epsabs=1e-13, epsrel=1e-12, limit=400)[0]
        assert got[j] == pytest.approx(exact, rel=1e-8, abs=1e-11)
    assert got.sum() == pytest.approx(low - high, rel=1e-10)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 12, 20, 33, 45])
def test_the_rule_integrates_what_it_interpolates(n):
    """v = 1 - tau, a polynomial that vanishes at infinity, is integrated exactly from r_max on by every number of steps."""
    c, r_max, r_min = 0.6, 150.0, 0.01
    scheme = untuned(r_max, r_min, c, 2 * c, n)
    assert scheme.nfe == n
    assert not scheme.gain.any()
    assert (np.triu(scheme.weights, 1) == 0).all()

    def v(theta):
        return 1 - float(tau(np.array(c * math.tan(theta)), 2 * c))

    points = [math.atan(r / c) for r in (r_max, *scheme.r[1:])]
    got = (scheme.weights @ (1 - tau(scheme.r[:-1], 2 * c)))[: n if n <= 7 else 0]
    moved = np.cumsum(got)
    for k, total in enumerate(moved):
        exact = -quad(v, points[k + 1], points[0], epsabs=1e-13, limit=200)[0]
        assert total == pytest.approx(exact, rel=1e-8)
    whole = float((scheme.weights @ (1 - tau(scheme.r[:-1], 2 * c))).sum())
    assert whole == pytest.approx(-quad(v, points[-1], points[0], epsabs=1e-13, limit=200)[0], rel=1e-8)


def test_nodes_are_even_in_tau():
    """Equal steps in tau from infinity to r_min; with so many that r_max is reached, from r_max."""
    for r_max, n, free in ((150.0, 9, True), (2.0, 9, False)):
        r = nodes(r_max, 0.01, 1.0, n)
        assert r.shape == (n + 1,)
        assert r[-1] == 0.01
        assert (np.diff(r) < 0).all()
        gaps = np.diff(tau(np.concatenate([[math.inf], r]) if free else r, 1.0))
        np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-9)
        assert (r[0] < r_max) if free else r[0] == pytest.approx(r_max, rel=1e-12)
        assert rule_weights(r, 0.5, 1.0, r_max).shape == (n, n)


def test_a_step_by_hand(flows):
    """u_(i+1) = u_i + sum_j w_ij v_j with v = cos(theta) eps - sin(theta) D/c, from the scheme's own numbers."""
    model, x, _ = flows["VPSDE"]
    sde, c, n = model.sde, model.sigma_data, 6
    r_max, r_min = (math.exp(-0.5 * float(sde.log_snr(t))) for t in (sde.t_max, sde.t_min))
    scheme = untuned(r_max, r_min, c, 0.7 * c * math.sqrt(2), n)
    u = x / float(sde.alpha(sde.t_max)) / math.hypot(r_max, c)
    seen = []
    for i, r in enumerate(scheme.r[:-1]):
        t = float(sde.time(-2 * math.log(r)))
        denoised, noise = model.predict(float(sde.alpha(t)) * math.hypot(r, c) * u, t)
        theta = math.atan(r / c)
        seen.append(math.cos(theta) * noise - math.sin(theta) * denoised / c)
        u = u + sum(w * v for w, v in zip(scheme.weights[i], seen, strict=False))
    expected = float(sde.alpha(sde.t_min)) * math.hypot(r_min, c) * u
    torch.testing.assert_close(sample(model, x.shape, method="auto", steps=n, x_init=x), expected, rtol=1e-8, atol=1e-9)


# -- tune ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(ring8):
    """Five evaluations learned on the ring under VP, with the model that counted its rows."""
    model = Counting(ring8.diffuse(VPSDE(t_min=1e-3)))
    return tune(model, 5, **QUICK), model.rows


def test_tuning_gains(tuned, flows):
    """On starts that it never saw, mean and median errors are below half of the rule's, as the report says."""
    sampler, rows = tuned
    model, x, exact = flows["VPSDE"]
    before, after = (distances(model, x, exact, m, steps=5) for m in ("auto", sampler))
    assert after.mean() < before.mean() / 2
    assert after.median() < before.median() / 2
    report = sampler.report
    assert report.gained
    assert (report.nfe, report.held_out) == (5, 64)
    assert report.rms[1] < report.rms[0]
    assert report.median[1] < report.median[0] / 2
    assert report.evaluations == rows
    assert report.median[0] * math.sqrt(2) == pytest.approx(float(before.median()), rel=0.3)
    assert "5 NFE, 64 held-out starts" in str(report)


def test_a_tuned_sampler_costs_what_it_was_tuned_for(tuned, flows):
    """Exactly nfe evaluations without saying so; another number, or another grid, is refused."""
    sampler = tuned[0]
    model = Counting(flows["VPSDE"][0])
    x = sample(model, (4, 2), method=sampler, seed=0)
    assert model.calls == 5
    assert torch.equal(sample(model, (4, 2), method=sampler, nfe=5, seed=0), x)
    with pytest.raises(ValueError, match="tuned for 5 evaluations, asked for 6"):
        sample(model, (4, 2), method=sampler, steps=6)
    with pytest.raises(ValueError, match="own noise levels"):
        sample(model, (4, 2), method=sampler, grid=[1.0, 0.5, 1e-3])


def test_tuning_is_a_function_of_its_seed(tuned, ring8):
    """The same arguments give the same bits, another seed other starts; no global random state is read or written."""
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    model = Counting(ring8.diffuse(VPSDE(t_min=1e-3)))
    again, other = tune(model, 5, **QUICK), tune(model, 5, seed=1, **QUICK)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    for name in ("r", "gain", "weights"):
        assert np.array_equal(getattr(again.scheme, name), getattr(tuned[0].scheme, name))
    assert torch.equal(again.mean, tuned[0].mean)
    assert not np.array_equal(other.scheme.r, again.scheme.r)


def network(seed=0, parameterization="edm", sde=None):
    """A small float32 network whose output layer is not zero."""
    torch.manual_seed(seed)
    net = MLP(2, width=16, depth=1, embedding=8)
    for p in net.parameters():
        nn.init.normal_(p, std=0.4, generator=torch.Generator().manual_seed(seed + p.numel()))
    return ScoreNet(net, VPSDE(t_min=1e-3) if sde is None else sde, parameterization, sigma_data=0.7, event_shape=(2,))


def test_tuning_a_network_saved_and_loaded(tmp_path):
    """A float32 network gains too, keeps its training mode, and its sampler comes back from the model's folder."""
    model = network().train()
    modes = [m.training for m in model.modules()]
    sampler = tune(model, 4, **QUICK)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert sampler.report.gained
    save_model(model, tmp_path, [sampler])
    back, found = load_model(tmp_path), load_samplers(tmp_path)
    assert list(found) == [4]
    assert found[4].report == sampler.report
    a, b = (sample(m, (16, 2), method=s, seed=0) for m, s in ((model, sampler), (back, found[4])))
    assert torch.equal(a, b)
    assert not torch.equal(a, sample(model, (16, 2), method="auto", steps=4, seed=0))
    with pytest.raises(ValueError, match="nothing to save"):
        save_sampler(FewStep(), tmp_path)


def test_tuning_with_conditions():
    """Starts take the conditions in turn, and rows of every condition end closer than with the rule."""
    model = ScoreNet(Pulled(torch.float64), VPSDE(t_min=1e-3), "denoise", event_shape=(2,))
    cond = torch.tensor([[0.0], [0.6], [-0.4]], dtype=torch.float64)
    sampler = tune(model, 4, cond=cond, **QUICK)
    assert sampler.report.gained
    assert not np.array_equal(sampler.scheme.r, tune(model, 4, cond=cond[:1], **QUICK).scheme.r)
    x, rows = starts(model.sde, 90, 5), cond.repeat(30, 1)
    exact = sample(model, x.shape, method=ProbabilityFlow(1e-8, 1e-8), x_init=x, cond=rows, grid=[1.0, 1e-3])
    before, after = (distances(model, x, exact, m, steps=4, cond=rows) for m in ("auto", sampler))
    for k in range(3):
        assert after[k::3].mean() < before[k::3].mean()


def test_nothing_to_gain():
    """Gaussian data, where the rule is exact: the rule comes back, with a warning and gained False."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 1.0).diffuse(VPSDE(t_min=1e-3))
    with pytest.warns(UserWarning, match="gained nothing on held-out starts"):
        sampler = tune(model, 3, **QUICK)
    assert sampler.report.gained is False
    got, rule = (sample(model, (8, 2), method=m, steps=3, seed=0) for m in (sampler, "auto"))
    assert torch.equal(got, rule)


@pytest.mark.parametrize("sde", [VESDE(), EDMSDE()], ids=lambda s: type(s).__name__)
def test_tuning_on_other_processes(sde, flows):
    """VE and EDM, whose states are large at the start."""
    model, x, exact = flows[type(sde).__name__]
    sampler = tune(model, 5, **(QUICK | dict(iterations=10)))
    assert distances(model, x, exact, sampler).mean() < distances(model, x, exact, "auto", steps=5).mean() / 2


@pytest.mark.parametrize("nfe", [1, 2])
def test_tuning_one_or_two_evaluations(nfe, ring8):
    """The smallest budgets work, and the median gains."""
    report = tune(ring8.diffuse(VPSDE(t_min=1e-3)), nfe, **QUICK).report
    assert report.median[1] < report.median[0]


def test_argument_errors(ring8):
    """Numbers out of range, a missing shape, conditions without rows, processes that end at sigma = 0."""
    model = ring8.diffuse(VPSDE(t_min=1e-3))
    for nfe, options, match in (
        (0, {}, "nfe must be at least 1"),
        (51, {}, "1 to 50 evaluations"),
        (30, dict(teacher_nfe=89), "teacher of at least three times"),
        (5, dict(starts=7), "starts must be at least 8"),
        (5, dict(held_out=0), "held_out must be at least 1"),
        (5, dict(jacobian_starts=2), "jacobian_starts must be at least 8"),
        (5, dict(iterations=0), "iterations must be at least 1"),
        (5, dict(history=0), "history must be at least 1"),
        (5, dict(event_shape=(3,)), "made for examples of shape"),
    ):
        with pytest.raises(ValueError, match=match):
            tune(model, nfe, **options)
    with pytest.raises(TypeError, match="nfe must be an integer"):
        tune(model, 5.0)
    with pytest.raises(TypeError, match="must be a ScoreModel"):
        tune(Shrink(), 5)
    with pytest.raises(ValueError, match="event_shape"):
        tune(ScoreNet(Shrink(), VPSDE()), 5)
    with pytest.raises(TypeError, match="cond must be"):
        tune(model, 5, cond="a cat")
    with pytest.raises(ValueError, match="sigma > 0 at t_min"):
        tune(ring8.diffuse(VPSDE(t_min=0.0)), 5)
    with pytest.raises(ValueError, match="c must be"):
        FewStep(c=-1.0)


def test_a_network_that_returns_nan():
    """The error names the noise level, and the training mode is back."""

    class Broken(Shrink):
        def forward(self, x, label):
            return torch.where((label < 0.5)[:, None], math.nan, super().forward(x, label))

    model = ScoreNet(Broken(), VPSDE(t_min=1e-3), event_shape=(2,)).train()
    with pytest.raises(NonFiniteError, match=r"network near sigma/alpha = \d") as caught:
        tune(model, 5, **QUICK)
    level = float(str(caught.value).rpartition("= ")[2].rstrip("."))
    assert 0.2 * 3.4 < level < 3.4  # sigma/alpha = 3.4 at t = 0.5
    assert model.training
    assert model.net.training


@pytest.mark.parametrize("times", [[1.0, 0.5, 1e-3], [1.0, 0.8, 0.6, 0.4, 0.2, 1e-3]])
def test_on_a_given_grid_it_is_plain_adams(times):
    """Off its own nodes infinity is no node: the endpoint stays sane, and equals Multistep's in the same coordinates."""
    model = GaussianMixture.isotropic([[-1.0, 0.0], [1.0, 0.0]], 0.2).diffuse(VPSDE(t_min=1e-3))
    x = sample(model, (256, 2), method="auto", grid=times, seed=0)
    assert float(x.std()) < 2.0
    assert torch.equal(x, sample(model, (256, 2), method=Multistep("angle", 3), grid=times, seed=0))


def test_tuned_samplers_stay_on_their_ground():
    """Another t_max or event shape than it was tuned for is an error that says so."""
    model = GaussianMixture.isotropic([[-1.0, 0.0], [1.0, 0.0]], 0.2).diffuse(VPSDE(t_min=1e-3))
    small = dict(starts=16, held_out=8, teacher_nfe=20, iterations=1, jacobian_starts=8)
    tuned = tune(model, 3, **small)
    with pytest.raises(ValueError, match="below the first evaluation"):
        sample(model, (2, 2), method=tuned, t_max=0.05, seed=0)
    other = GaussianMixture.isotropic([[-1.0, 0.0, 0.0]], 0.2).diffuse(VPSDE(t_min=1e-3))
    with pytest.raises(ValueError, match=r"tuned for examples of shape \(2,\), got \(3,\)"):
        sample(other, (2, 3), method=tuned, seed=0)
    for bad, error in (
        (dict(seed=None), TypeError),
        (dict(event_shape=2), TypeError),
        (dict(cond=torch.tensor(1.0)), ValueError),
    ):
        with pytest.raises(error):
            tune(model, 3, **(small | bad))


class Shapeless(ScoreModel):
    """A model of any shape, which says none."""

    def __init__(self, sde):
        super().__init__()
        self.sde = sde

    def denoise(self, x, t, cond=None):
        return 0.5 * torch.tanh(x)


@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("shape", [(3,), (1,), (2, 2), (1, 2)], ids=str)
def test_tuned_for_examples_of_one_shape(shape, gained):
    """A model without event_shape is no way round: shapes that broadcast against the mean's are refused too, also after saving."""
    sde = VPSDE(t_min=1e-3)
    scheme = untuned(*(math.exp(-0.5 * float(sde.log_snr(t))) for t in (1.0, 1e-3)), 0.5, 1.0, 3)
    mean = torch.tensor([0.1, 0.2]) if gained else None
    tuned = FewStep(scheme, 0.5, mean, event_shape=(2,), model_sha256="0" * 64)
    again = FewStep.from_tensors(*tuned.to_tensors())
    assert again.event_shape == (2,)
    assert again.model_sha256 == "0" * 64
    for sampler in (tuned, again):
        assert sample(Shapeless(sde), (4, 2), method=sampler, seed=0).shape == (4, 2)
        with pytest.raises(ValueError, match=r"tuned for examples of shape \(2,\), got"):
            sample(Shapeless(sde), (4, *shape), method=sampler, seed=0)


def test_tune_records_the_shape(flows):
    """The sampler that tune returns knows what it was tuned on, with or without a gain; an old file says nothing."""
    model = flows["VPSDE"][0]
    tuned = tune(model, 3, starts=16, held_out=8, teacher_nfe=20, iterations=1, jacobian_starts=8)
    assert tuned.event_shape == (2,)
    tensors, _ = tuned.to_tensors()
    old = FewStep.from_tensors(
        {"r": tensors["r"], "gain": tensors["gain"], "weights": tensors["weights"]}, {"c": 1.0, "report": None}
    )
    assert old.event_shape is None
    assert old.model_sha256 is None
    with pytest.raises(ValueError, match="the mean of a sampler"):
        FewStep(mean=torch.zeros(2), event_shape=(3,))


def test_a_scheme_has_no_single_steps(flows):
    """Steps or times that are not the scheme's own are an error, never other weights for them."""
    model, x, _ = flows["VPSDE"]
    with pytest.raises(ValueError, match=r"no single step from t = 0\.5 to 0\.4"):
        FewStep().step(model, x, 0.5, 0.4, State(), RandomSource(0, "cpu", len(x)))
    with pytest.raises(ValueError, match="not the times of this sampler"):
        FewStep().start(model, torch.tensor([1.0, 0.5, 0.1, 1e-3], dtype=torch.float64))


def test_own_times_are_recognised_at_every_number_of_steps(sde, ring8):
    """Also where the first move stops being free, which is where one number of evaluations more has as many times."""
    model = ring8.diffuse(sde)
    frees = []
    for n in (*range(1, 25), *range(25, 120, 5)):
        times = FewStep().times(model, n)
        assert FewStep().evaluations(model, times) == n
        frees.append(len(times) == n + 2)
    assert frees[0]
    assert frees == sorted(frees, reverse=True)
