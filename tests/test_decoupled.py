"""The decoupled likelihood engine: its curve, its identity, its traces, and the errors that it reports."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    Exact,
    GaussianMixture,
    Hadamard,
    Hutchinson,
    NonFiniteError,
    RectifiedFlow,
    ScoreNet,
    encode,
    log_prob,
)
from scoresde.flow import AnglePath
from scoresde.likelihood import LikelihoodPlan
from scoresde.likelihood.decoupled.quadrature import FlowTrajectory, rule_error
from scoresde.likelihood.decoupled.refinement import default_plan
from scoresde.likelihood.decoupled.trajectory import (
    DENSE,
    AngleWarp,
    Field,
    dense,
    equispaced,
    evaluations,
    gauss_legendre,
    trace_curve,
)
from scoresde.ode import MAX_NFE, OK, UNRESOLVED
from scoresde.rng import RandomSource, spawn


def correlated(event, seed=0):
    """Three Gaussians with full covariances and means apart, of any shape."""
    d = math.prod(event)
    g = torch.Generator().manual_seed(seed)
    roots = 0.3 * torch.randn(3, d, d, generator=g, dtype=torch.float64) / d**0.5
    covariances = roots @ roots.mT + 0.05 * torch.eye(d, dtype=torch.float64)
    means = 0.5 * torch.randn(3, d, generator=g, dtype=torch.float64)
    return GaussianMixture([0.5, 0.3, 0.2], means, covariances, event_shape=event)


@pytest.fixture(scope="module")
def image64():
    """Two clouds of 1 x 8 x 8 images whose neighbouring pixels belong together."""
    g = torch.Generator().manual_seed(4)
    pattern = 0.35 * torch.randn(1, 64, generator=g, dtype=torch.float64).clamp(-1, 1)
    position = torch.arange(8, dtype=torch.float64)
    near = torch.exp(-0.5 * ((position[:, None] - position) / 1.5) ** 2) + 0.2 * torch.eye(8, dtype=torch.float64)
    covariance = 0.01 * torch.kron(near, near)
    means = torch.cat([pattern, -pattern])
    return GaussianMixture([0.5, 0.5], means, covariance.expand(2, 64, 64), event_shape=(1, 8, 8))


class Tanh(nn.Module):
    """A small smooth network of x and its label, the same for every dtype."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(3, 32), nn.Linear(32, 2)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=g)
        self.to(dtype)

    def forward(self, x, label):
        return self.second(torch.tanh(self.first(torch.cat([x, label.to(x)[:, None]], 1))))


def bound_on(result):
    """What the result itself says of the solver's error, nats."""
    return result.trajectory_error + result.quadrature_error


# -- against the closed form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [(2,), (16,), (64,), (1, 4, 4), (2, 3, 3)], ids=str)
def test_density_at_the_default_tolerance(sde, event, ring8):
    """Exact traces give the mixture's own density at t_min to 1e-3 nats on average, whatever the shape."""
    mixture, n = (ring8, 64) if event == (2,) else (correlated(event), 1 if event == (64,) else 6)
    model, x = mixture.diffuse(sde), mixture.sample(n, seed=1)
    got = log_prob(model, x, divergence=Exact())
    assert float((got.value - model.log_prob(x, sde.t_min)).abs().mean()) < 1e-3
    assert (got.status == OK).all()
    assert (got.stderr == 0).all()
    assert got.value.dtype == torch.float64
    assert got.latent.shape == x.shape
    assert (bound_on(got) <= 10 * 2e-5).all()


@pytest.mark.parametrize("name", ["ring8", "full3"])
def test_density_at_a_tight_tolerance(sde, name, request):
    """rtol = atol = 1e-7 leaves less than 1e-5 nats in 2D and 3D."""
    mixture = request.getfixturevalue(name)
    model, x = mixture.diffuse(sde), mixture.sample(16, seed=1)
    got = log_prob(model, x, rtol=1e-7, atol=1e-7)
    assert float((got.value - model.log_prob(x, sde.t_min)).abs().mean()) < 1e-5
    assert (got.status == OK).all()


def test_one_dimension(sde):
    """Data (B, 1), and a batch of one: the density of two Gaussians on a line."""
    mixture = GaussianMixture.isotropic([[-0.5], [0.7]], 0.2)
    model, x = mixture.diffuse(sde), mixture.sample(5, seed=0)
    got = log_prob(model, x)
    torch.testing.assert_close(got.value, model.log_prob(x, sde.t_min), rtol=0, atol=1e-3)
    assert log_prob(model, x[:1]).value.shape == (1,)


# -- the identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ring8", "full3", "image16"])
def test_any_curve_gives_the_value(sde, name, request):
    """Along ten coarse nodes the trace alone is wrong by more than 10 times what is left with the correction, in every row but
    a few, and what is left is below 1e-3 nats where the trace alone loses 1e-3 to 0.1."""
    mixture = request.getfixturevalue(name)
    model, x = mixture.diffuse(sde), mixture.sample(8, seed=2)
    plan = LikelihoodPlan(
        AngleWarp(*model.flow_scales), 10, AngleWarp(*model.trace_scales), 60 if name == "image16" else 120
    )
    path = FlowTrajectory(model, x, plan)
    rule, trace, correction = path.integrand(Exact(), RandomSource(0, "cpu", 8))
    weights = torch.from_numpy(rule.weights)
    plain = model.terminal_log_prob(path.latent) + path.growth + weights @ trace[:, :, 0]
    truth = model.log_prob(x, sde.t_min)
    corrected, uncorrected = (plain + weights @ correction - truth).abs(), (plain - truth).abs()
    assert float(uncorrected.mean()) > 1e-3
    assert float(uncorrected.mean()) > 10 * float(corrected.mean())
    assert float(corrected.max()) < 1e-3
    assert float((uncorrected > 10 * corrected).double().mean()) > 0.8
    whole = path.integrate(Exact(), RandomSource(0, "cpu", 8))
    torch.testing.assert_close(whole.change[:, 0] + model.terminal_log_prob(path.latent), plain + weights @ correction)


def test_the_curve_bends_the_value_without_its_correction(full3):
    """A curve moved away from the flow on purpose, by a bump in its slopes, still gives the value to second order in the bump."""
    sde = VPSDE()
    model, x = full3.diffuse(sde), full3.sample(8, seed=4)
    path = FlowTrajectory(
        model, x, LikelihoodPlan(AngleWarp(*model.flow_scales), 60, AngleWarp(*model.trace_scales), 160)
    )
    truth = model.log_prob(x, sde.t_min)
    slopes = path.curve.slopes.clone()
    wave = torch.sin(torch.linspace(0, 6, 60, dtype=torch.float64))[:, None, None]

    def error(size):
        path.curve = dataclasses.replace(path.curve, slopes=slopes + size * wave)
        latent = path.curve.end * float(path.path.scale(1.0))
        change = path.integrate(Exact(), RandomSource(0, "cpu", 8)).change[:, 0]
        return float((model.terminal_log_prob(latent) + change - truth).abs().mean())

    # an exact score: the identity is exact, not only to second order
    assert error(1e-2) < 1e-4


# -- the curve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(0.01, 0.003), (0.05, 1.0), (0.3, 0.03)])
def test_stretch(scales):
    """The inverse inverts to the last digits, and the slope is the derivative."""
    stretch, theta = AngleWarp(*scales), np.linspace(1e-3, np.pi / 2 - 1e-4, 200)
    back = stretch.inverse(stretch(theta), 1e-3, np.pi / 2)
    np.testing.assert_allclose(back, theta, rtol=0, atol=1e-14)
    h = 1e-6
    np.testing.assert_allclose(
        (stretch(theta + h) - stretch(theta - h)) / (2 * h), stretch.slope(theta), rtol=1e-6, atol=0
    )
    assert (np.diff(stretch(theta)) > 0).all()


def test_grids():
    """Equal steps in s from end to end; Gauss-Legendre weights that integrate functions of theta."""
    stretch, low, high = AngleWarp(0.05, 0.3), 0.01, np.pi / 2
    theta, spacing = equispaced(stretch, low, high, 13)
    assert theta[0] == low
    assert theta[-1] == high
    np.testing.assert_allclose(np.diff(stretch(theta)), spacing, rtol=1e-9)
    rule = gauss_legendre(stretch, low, high, 40)
    assert ((low < rule.theta) & (rule.theta < high)).all()
    np.testing.assert_allclose(rule.weights @ np.sin(rule.theta), np.cos(low) - np.cos(high), rtol=1e-11)


@pytest.mark.parametrize("n", [2, 3, 5, 6, 9, 20])
def test_dense_reproduces_polynomials(n):
    """Slopes that are a polynomial of the interpolation's degree (or fewer nodes allow): its integral and value, anywhere."""
    degree = min(DENSE, n - 1)
    at = tuple(np.linspace(0, n - 1, 31).tolist())
    integral, value = dense(n, DENSE, at)
    assert integral.shape == value.shape == (31, n)
    for power in range(degree + 1):
        slopes = (np.arange(n) / n) ** power
        np.testing.assert_allclose(value @ slopes, (np.array(at) / n) ** power, rtol=0, atol=1e-9)
        exact = n * (np.array(at) / n) ** (power + 1) / (power + 1)
        np.testing.assert_allclose(integral @ slopes, exact, rtol=0, atol=1e-8)


def test_dense_is_continuous():
    """The integral has no jumps at nodes and its derivative is the value between them."""
    slopes = np.sin(np.arange(12.0))
    h = 1e-6
    for x in (3.0, 4.5, 10.99):
        (low, mid, high), value = (m @ slopes for m in dense(12, DENSE, (x - h, x, x + h)))
        assert high - 2 * mid + low == pytest.approx(0, abs=1e-9)
        assert (high - low) / (2 * h) == pytest.approx(value[1], abs=1e-6)


@pytest.mark.parametrize("name", ["full3", "ring8"])
def test_order_of_the_trajectory(name, request):
    """Four times the nodes, at least 4^3.5 times closer to the end that encode finds at rtol 1e-10."""
    mixture = request.getfixturevalue(name)
    for sde in (VPSDE(), VESDE()):
        model, x = mixture.diffuse(sde), mixture.sample(8, seed=2)
        expected = encode(model, x, rtol=1e-10, atol=1e-10)
        measure = AngleWarp(*model.trace_scales)
        errors = [
            float(
                (
                    FlowTrajectory(model, x, LikelihoodPlan(AngleWarp(*model.flow_scales), n, measure, 2)).latent
                    - expected
                )
                .abs()
                .max()
            )
            / sde.prior_std
            for n in (48, 192)
        ]
        assert math.log(errors[0] / errors[1]) / math.log(4) > 3.5
        assert errors[1] < 1e-6


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 30])
def test_evaluations_are_counted(nodes):
    """evaluations(n) is what the network sees, at n different times, each within the ends of the solve."""
    for sde, parameterization in ((VPSDE(), "noise"), (RectifiedFlow(), "noise"), (EDMSDE(), "denoise")):
        net = Watched()
        model, x = ScoreNet(net, sde, parameterization), torch.full((3, 2), 0.3, dtype=torch.float64)
        path = AnglePath(sde)
        ends = (sde.t_min, model.flow_end)
        low, high = (float(path.angle(t)) for t in ends)
        theta, spacing = equispaced(AngleWarp(0.01, 0.1), low, high, nodes)
        u = x / float(path.scale(sde.t_min))
        curve = trace_curve(Field(model, path, u, theta, ends, None), AngleWarp(0.01, 0.1), u, theta, spacing)
        assert len(net.labels) == evaluations(nodes)
        assert len(set(net.labels)) == nodes
        assert sde.t_min <= min(net.labels)
        assert max(net.labels) <= model.flow_end
        assert curve.slopes.shape == (nodes, 3, 2)


class Watched(nn.Module):
    """0.5 x, and the labels that were asked for."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.labels = []

    def forward(self, x, label):
        assert (label == label[0]).all()
        self.labels.append(float(label[0]))
        return self.scale * x


def test_work_is_what_is_reported(sde):
    """nfe is the number of calls per example, none of them outside [t_min, flow_end]."""
    net = Watched()
    model = ScoreNet(net, sde, "noise", sigma_data=0.7)
    got = log_prob(model, torch.full((1, 2), 0.3, dtype=torch.float64))
    assert int(got.nfe[0]) == len(net.labels)
    assert sde.t_min <= min(net.labels)
    assert max(net.labels) <= model.flow_end
    net.labels.clear()
    plan = LikelihoodPlan(AngleWarp(0.01, 0.1), 9, AngleWarp(0.01, 0.1), 7)
    assert plan.nfe == evaluations(9) + 7
    FlowTrajectory(model, torch.full((4, 2), 0.3, dtype=torch.float64), plan).integrate(
        Hutchinson(3), RandomSource(0, "cpu", 4)
    )
    assert len(net.labels) == plan.nfe


def test_plans_refuse_nonsense():
    """A plan needs two nodes and two points at least."""
    for nodes, points in ((1, 8), (8, 1), (0, 8), (8, 2.5)):
        with pytest.raises((ValueError, TypeError), match=r"nodes|points"):
            LikelihoodPlan(AngleWarp(0.1, 0.1), nodes, AngleWarp(0.1, 0.1), points)


# -- estimated traces ------------------------------------------------------------------------------------------------


def repeated(mixture, divergence, copies=300, **options):
    """Errors over seeds for one example of a mixture, and the result."""
    sde = VPSDE()
    model, x = mixture.diffuse(sde), mixture.sample(1, seed=1)
    got = log_prob(model, x.expand(copies, *x.shape[1:]), divergence=divergence, seed=spawn(0, copies), **options)
    return got.value - model.log_prob(x, sde.t_min), got


@pytest.mark.parametrize(
    "divergence", [Hutchinson(2), Hadamard(4, 2), Hadamard(8, 1)], ids=["hutchinson2", "hadamard4,2", "hadamard8,1"]
)
def test_estimated_traces_are_unbiased(divergence, image64):
    """z-test of the mean over 300 seeds."""
    for mixture in (image64, correlated((64,))):
        error, got = repeated(mixture, divergence)
        assert (got.status == OK).all()
        assert float(error.std()) > 1e-3
        assert abs(float(error.mean())) < 4 * float(error.std()) / 300**0.5


@pytest.mark.parametrize("divergence", [Hadamard(8, 2), Hutchinson(4)], ids=["hadamard8,2", "hutchinson4"])
def test_reported_errors_are_those_observed(divergence, image64):
    """Root mean squares of the observed and of the reported errors agree within a quarter."""
    for mixture in (image64, correlated((64,))):
        error, got = repeated(mixture, divergence)
        assert 0.8 < float(error.square().mean().sqrt() / got.stderr.square().mean().sqrt()) < 1.25


def test_a_single_estimate_reports_no_error(image16):
    """One probe, and one replicate of orthogonal probes, say NaN."""
    for divergence in (Hutchinson(1), Hadamard(4, 1)):
        _, got = repeated(image16, divergence, copies=3)
        assert torch.isnan(got.stderr).all()
        assert torch.isfinite(got.value).all()


def test_orthogonal_probes_pay_along_a_trajectory(image64):
    """On images with local correlation, eight orthogonal products per point have less than half the spread of eight free ones."""
    hadamard, hutchinson = (float(repeated(image64, d)[0].std()) for d in (Hadamard(8, 1), Hutchinson(8)))
    assert hadamard < 0.5 * hutchinson


def test_orthogonal_probes_follow_one_another(image16):
    """A place takes the rows after those of the last one, with the signs kept; after all of them the sequence begins again."""
    sequence = Hadamard(4, 2).probe_sequence((3, 1, 4, 4), torch.float64, RandomSource(0, "cpu", 3))
    places = [sequence(i) for i in range(9)]
    assert places[0].shape == (3, 4, 1, 4, 4)
    rows = torch.stack(places[:8], 1).unflatten(2, (2, 2)).transpose(2, 3).flatten(1, 2)[:, :, 0].flatten(2)
    for one in rows:
        assert torch.equal(one @ one.T, 16 * torch.eye(16, dtype=torch.float64))
    assert torch.equal(places[8], places[0])
    fresh = Hutchinson(2).probe_sequence((3, 4), torch.float64, RandomSource(0, "cpu", 3))
    assert not torch.equal(fresh(0), fresh(1))


# -- the standard error that is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "target"),
    [
        (Hadamard(8, 2), 0.02),
        (Hadamard(4, 2), 0.03),
        (Hutchinson(1), 0.3),
        (Hutchinson(2), 0.2),
    ],
    ids=["hadamard8,2", "hadamard4,2", "hutchinson1", "hutchinson2"],
)
def test_standard_error_on_request(divergence, target, image16):
    """Every example reports what was asked for, and the errors over seeds are at most 1.3 times as large as reported."""
    error, got = repeated(image16, divergence, copies=600, stderr=target)
    assert (got.stderr <= target).all()
    assert (got.status == OK).all()
    assert float(error.square().mean().sqrt()) < 1.3 * float(got.stderr.square().mean().sqrt())


def test_a_smaller_standard_error_costs_more(image16):
    """Halving it takes more evaluations; the first round's are the least."""
    sde = VPSDE()
    model, x = image16.diffuse(sde), image16.sample(4, seed=1)
    plain = log_prob(model, x, divergence=Hutchinson(8), seed=0)
    costs = [
        float(log_prob(model, x, divergence=Hutchinson(8), seed=0, stderr=s).nfe.double().mean())
        for s in (100.0, 0.2, 0.1)
    ]
    assert costs[0] == float(plain.nfe.double().mean())
    assert costs[0] < costs[1] < costs[2]
    assert costs[2] > 2.5 * (costs[1] - costs[0])


def test_standard_error_with_an_exact_trace(ring8):
    """An exact trace has none: nothing more is done."""
    model, x = ring8.diffuse(VPSDE()), ring8.sample(4, seed=1)
    plain, asked = log_prob(model, x), log_prob(model, x, stderr=1e-6)
    assert torch.equal(plain.value, asked.value)
    assert torch.equal(plain.nfe, asked.nfe)


def test_standard_error_beyond_the_budget(image16):
    """Where max_nfe forbids it, a warning counts the examples, and the budget is kept."""
    model, x = image16.diffuse(VPSDE()), image16.sample(6, seed=1)
    with pytest.warns(UserWarning, match=r"6 of 6 examples did not reach stderr=0\.05 nats within max_nfe=150"):
        got = log_prob(model, x, divergence=Hutchinson(2), seed=0, stderr=0.05, max_nfe=150)
    assert (got.stderr > 0.05).all()
    assert (got.nfe <= 150).all()
    assert torch.isfinite(got.value).all()


def test_standard_error_that_stays_unknown(image16):
    """One probe and a budget for one round: the standard error is NaN, which is not what was asked for, so it warns too."""
    model, x = image16.diffuse(VPSDE()), image16.sample(6, seed=1)
    with pytest.warns(UserWarning, match="6 of 6 examples did not reach"):
        log_prob(model, x, divergence=Hutchinson(1), seed=0, stderr=0.05, max_nfe=70)


def test_the_warning_points_at_the_caller(image16):
    """It names the line that called log_prob."""
    model, x = image16.diffuse(VPSDE()), image16.sample(2, seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_prob(model, x, divergence=Hutchinson(2), seed=0, stderr=0.01, max_nfe=150)
    assert [w.filename for w in caught] == [__file__]


def test_options_of_the_decoupled_method_alone(full3):
    """stderr, differentiable and plan mean nothing to a Runge-Kutta method: refused, and so is a graph of added probes."""
    model, x = full3.diffuse(VPSDE()), full3.sample(2, seed=0)
    plan = LikelihoodPlan(AngleWarp(0.1, 0.1), 20, AngleWarp(0.1, 0.1), 20)
    for options in ({"stderr": 0.1}, {"differentiable": True}, {"plan": plan}):
        with pytest.raises(ValueError, match='"decoupled"'):
            log_prob(model, x, method="tsit5", **options)
    with pytest.raises(ValueError, match="give probes instead"):
        log_prob(model, x, stderr=0.1, differentiable=True)
    for stderr in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="stderr"):
            log_prob(model, x, stderr=stderr)


# -- independence of the rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ring8", dict(divergence=Exact())),
        ("image16", dict(divergence=Hadamard(4, 2), stderr=0.15)),
        ("image16", dict(divergence=Hutchinson(2), rtol=1e-3, atol=1e-3)),
    ],
    ids=["refined", "rounds", "plain"],
)
def test_rows_do_not_feel_their_batch(name, options, request):
    """Alone, in a batch, in another order: the same value, work and error, also where only some rows are refined."""
    mixture = request.getfixturevalue(name)
    model, x = mixture.diffuse(VPSDE()), mixture.sample(16, seed=5)[4:]
    seeds = spawn(7, 12)
    whole = log_prob(model, x, seed=seeds, **options)
    if "plain" not in request.node.callspec.id:
        assert len(whole.nfe.unique()) > 1  # otherwise nothing is tested
    flipped = log_prob(model, x.flip(0), seed=seeds[::-1], **options)
    torch.testing.assert_close(flipped.value.flip(0), whole.value, rtol=0, atol=1e-9)
    torch.testing.assert_close(flipped.stderr.flip(0), whole.stderr, rtol=0, atol=1e-9)
    assert torch.equal(flipped.nfe.flip(0), whole.nfe)
    for i in (int(whole.nfe.argmax()), int(whole.nfe.argmin()), 3):
        alone = log_prob(model, x[i : i + 1], seed=seeds[i : i + 1], **options)
        torch.testing.assert_close(alone.value, whole.value[i : i + 1], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.latent, whole.latent[i : i + 1], rtol=0, atol=1e-9)
        assert int(alone.nfe) == int(whole.nfe[i])


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(2)], ids=["exact", "hutchinson"])
def test_conditions_go_with_their_rows(divergence):
    """Each example's condition and probes follow it through refinement, which only some rows need."""

    class Scaled(nn.Module):
        def forward(self, x, label, cond):
            return cond[:, None] * torch.tanh(8 * x)

    model, options = ScoreNet(Scaled(), VPSDE(), "noise"), dict(rtol=1e-8, atol=1e-8, divergence=divergence)
    if not isinstance(
        divergence, Exact
    ):  # so coarse a start that the trajectory's error is seen beside the probes' noise
        options["plan"] = LikelihoodPlan(AngleWarp(*model.flow_scales), 5, AngleWarp(*model.trace_scales), 16)
    x = 0.3 * torch.ones(6, 2, dtype=torch.float64)
    cond = torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    seeds = spawn(1, 6)
    whole = log_prob(model, x, cond=cond, seed=seeds, **options)
    assert len(whole.nfe.unique()) > 1
    for i in range(6):
        alone = log_prob(model, x[i : i + 1], cond=cond[i : i + 1], seed=seeds[i : i + 1], **options)
        torch.testing.assert_close(alone.value, whole.value[i : i + 1], rtol=0, atol=1e-9)


# -- budgets and the errors that are reported ------------------------------------------------------------------------


@pytest.mark.parametrize("max_nfe", [4, 7, 12, 20, 33])
def test_small_budgets(max_nfe, ring8, full3):
    """A status, a finite value, and estimates that cover its error ten times; the budget is kept."""
    sde = VPSDE()
    for mixture in (ring8, full3):
        model, x = mixture.diffuse(sde), mixture.sample(64, seed=5)
        got = log_prob(model, x, max_nfe=max_nfe)
        error = (got.value - model.log_prob(x, sde.t_min)).abs()
        assert (got.nfe <= max_nfe).all()
        assert torch.isfinite(got.value).all()
        assert (got.status != UNRESOLVED).all()
        if max_nfe < 30:
            assert (got.status == MAX_NFE).all()
        assert float((error <= 10 * bound_on(got) + 1e-6).double().mean()) >= 0.98


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_estimates_cover_the_errors(tolerance, ring8):
    """At least 95 % of the rows are within three times what they report, and all within the tolerance, 10 (rtol + atol)."""
    sde = VPSDE()
    model, x = ring8.diffuse(sde), ring8.sample(200, seed=5)
    got = log_prob(model, x, rtol=tolerance, atol=tolerance)
    error = (got.value - model.log_prob(x, sde.t_min)).abs()
    assert (got.status == OK).all()
    assert float((error <= 20 * tolerance).double().mean()) > 0.9
    assert float((error <= 3 * bound_on(got) + 1e-6).double().mean()) >= 0.95


@pytest.mark.parametrize(("parameterization", "factor"), [("noise", 3), ("edm", 10)])
def test_estimates_of_a_network_cover_its_errors(parameterization, factor, ring8):
    """The same for networks, against an adaptive solve of far smaller tolerance; less tightly where the label is log sigma."""
    model, x = ScoreNet(Tanh(), VPSDE(), parameterization), ring8.sample(16, seed=1)
    exact = log_prob(model, x, method="tsit5", rtol=1e-9, atol=1e-9).value
    for tolerance in (1e-3, 1e-5):
        got = log_prob(model, x, rtol=tolerance, atol=tolerance)
        assert (got.status == OK).all()
        assert float(((got.value - exact).abs() <= factor * bound_on(got) + 1e-6).double().mean()) >= 0.95


def test_float32_networks_stop_at_their_rounding(ring8):
    """Asked for 1e-9, a network in float32 is refined no further than its rounding lets it, and says what it reached."""
    model, x = ScoreNet(Tanh(torch.float32), VPSDE(), "noise"), ring8.sample(16, seed=1).float()
    exact = log_prob(ScoreNet(Tanh(), VPSDE(), "noise"), x.double(), rtol=1e-9, atol=1e-9).value
    plain, tight = (log_prob(model, x, rtol=tol, atol=tol) for tol in (1e-5, 1e-9))
    assert torch.isfinite(tight.value).all()
    assert ((tight.status == OK) | (tight.status == UNRESOLVED)).all()
    assert float(tight.nfe.double().mean()) < 10 * float(plain.nfe.double().mean())
    assert int(tight.nfe.max()) < 25 * int(plain.nfe.max())
    assert float((tight.value - exact).abs().max()) < 5e-5
    assert float((plain.value - exact).abs().max()) < 5e-5


def test_budgets_hold_with_the_fallback(ring8):
    """Whatever engine finishes an example, max_nfe bounds its evaluations, and no value is lost for a better one."""
    model, x = ScoreNet(Tanh(torch.float32), VPSDE(), "edm"), ring8.sample(3, seed=1)
    for max_nfe in (3000, 3600):
        got = log_prob(model, x, rtol=1e-9, atol=1e-9, max_nfe=max_nfe)
        assert (got.nfe <= max_nfe).all()
        assert torch.isfinite(got.value).all()


def test_rule_error_follows_the_error():
    """Of a smooth integrand: never less than a tenth of the true error, and vanishing with it."""
    stretch, low, high = AngleWarp(0.1, 0.3), 0.01, math.pi / 2
    f = lambda theta: 1 / (1 + 30 * (theta - 0.7) ** 2)  # noqa: E731
    fine = gauss_legendre(stretch, low, high, 200)
    exact, estimates = fine.weights @ f(fine.theta), []
    for points in (8, 12, 16, 24, 32):
        rule = gauss_legendre(stretch, low, high, points)
        error = abs(rule.weights @ f(rule.theta) - exact)
        estimates.append(float(rule_error(torch.from_numpy(f(rule.theta))[:, None], rule, stretch)))
        assert error < 10 * estimates[-1] + 1e-12
    assert estimates[-1] < 1e-2 * estimates[0]


def test_tighter_tolerances_start_finer(ring8):
    """The default plan grows as the tolerance shrinks; with an estimated trace it has few points and many nodes."""
    model = ring8.diffuse(VPSDE())
    sizes = [default_plan(model, t, exact=True).nfe for t in (1e-1, 1e-3, 1e-5)]
    assert sizes[0] < sizes[1] < sizes[2]
    plan = default_plan(model, 1e-4, exact=False)
    assert plan.points < plan.nodes


# -- faults ----------------------------------------------------------------------------------------------------------


class NaNBeyond(nn.Module):
    """NaN from a time on, for rows whose first entry is positive; with `graph`, only where a gradient is wanted."""

    def __init__(self, start, graph=False):
        super().__init__()
        self.start, self.graph = start, graph

    def forward(self, x, label):
        bad = (label >= self.start) & (x[:, 0] > 0)
        return torch.where((bad & (torch.is_grad_enabled() or not self.graph))[:, None], math.nan, 0.5 * x)


@pytest.mark.parametrize("graph", [False, True], ids=["trajectory", "divergence"])
@pytest.mark.parametrize("start", [0.0, 0.3, 0.8])
def test_nan_from_the_network(start, graph):
    """An error that names t and the rows, on the trajectory and at the points of the divergence."""
    x = torch.tensor([[-0.1, 0.2], [0.3, 0.4], [-0.5, 0.6], [0.5, 0.1]])
    with pytest.raises(NonFiniteError, match=r"NaN or infinity at t = .* rows \[1, 3\]") as caught:
        log_prob(ScoreNet(NaNBeyond(start, graph), VPSDE(), "noise"), x)
    t = float(str(caught.value).split("t = ")[1].split(",")[0])
    assert t == pytest.approx(max(start, 1e-5), abs=0.05)


def test_rows_of_an_error_are_those_of_the_batch():
    """NaN that only a finer pass meets is reported with the rows of the whole batch, not of those refined."""

    class Steep(nn.Module):
        def forward(self, x, label, cond):
            out = cond[:, None] * torch.tanh(8 * x)
            return out if len(x) == 6 else out * math.nan

    x = 0.3 * torch.ones(6, 2, dtype=torch.float64)
    cond = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"rows \[5\]"):
        log_prob(ScoreNet(Steep(), VPSDE(), "noise"), x, cond=cond, rtol=1e-8, atol=1e-8)


class Detached(nn.Module):
    def forward(self, x, label):
        return 0.5 * x.detach()


class NoGrad(nn.Module):
    def forward(self, x, label):
        with torch.no_grad():
            return 0.5 * x


class DetachedWithParameters(nn.Module):
    """Depends on x without saying so, and differentiably on a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, label):
        return self.scale * x.detach()


@pytest.mark.parametrize("net", [Detached, NoGrad, DetachedWithParameters])
def test_detached_networks(net):
    """A network that hides its dependence on x is refused in words, for every estimator: its divergence would be wrong."""
    for divergence in (Exact(), Hutchinson(2), Hadamard(2, 1)):
        with pytest.raises(ValueError, match="detach"):
            log_prob(ScoreNet(net(), VPSDE(), "noise"), torch.ones(2, 2), divergence=divergence, seed=0)


class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 0.5 * x


class WithoutBackward(nn.Module):
    def forward(self, x, label):
        return OneWay.apply(x)


class WithoutDerivative(nn.Module):
    def forward(self, x, label):
        return torch.igamma(x.abs() + 1, x.abs() + 1)


@pytest.mark.parametrize("net", [WithoutBackward, WithoutDerivative])
def test_operators_without_a_derivative(net):
    """An operator that cannot be differentiated: an error in words that says what to do."""
    with pytest.raises(ValueError, match="cannot be differentiated"):
        log_prob(ScoreNet(net(), VPSDE(), "noise"), torch.ones(2, 2))


@pytest.mark.parametrize("options", [{}, {"stderr": 0.1}, {"differentiable": True}], ids=["plain", "stderr", "graph"])
def test_empty_batches(options, image16, ring8):
    """Nothing in, nothing out, of the right shapes."""
    for mixture in (ring8, image16):
        x = torch.zeros(0, *mixture.event_shape)
        for divergence in (None, Exact(), Hadamard(4, 2)):
            got = log_prob(mixture.diffuse(VPSDE()), x, divergence=divergence, seed=0, **options)
            for field in dataclasses.fields(got):
                assert getattr(got, field.name).shape[0] == 0
            assert got.latent.shape == x.shape
