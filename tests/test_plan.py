"""Surveys: where a decoupled solve should look, and whether what they foresee comes true."""

import dataclasses
import math

import pytest
import torch

from scoresde import VPSDE, Exact, GaussianMixture, Hadamard, Hutchinson, ScoreNet, bits_per_dim, log_prob
from scoresde.likelihood import LikelihoodPlan, plan_likelihood, quantize
from scoresde.likelihood.decoupled.quadrature import FlowTrajectory
from scoresde.likelihood.decoupled.refinement import default_plan
from scoresde.likelihood.decoupled.survey import FINE, GOAL, MEASURES, POINTS, model_examples, survey
from scoresde.rng import RandomSource, spawn


def images(event, scale, modes=3):
    """Gaussian clouds of images whose neighbouring pixels belong together."""
    channels, rows, columns = event
    position = torch.arange(max(rows, columns)).double()

    def near(n):
        apart = position[:n, None] - position[:n]
        return torch.exp(-0.5 * (apart / 1.2) ** 2) + 0.05 * torch.eye(n).double()

    mixed = 0.7 * torch.ones(channels, channels).double() + 0.3 * torch.eye(channels).double()
    covariance = scale * torch.kron(mixed, torch.kron(near(rows), near(columns)))
    d = math.prod(event)
    means = 0.2 * torch.randn(modes, d, generator=torch.Generator().manual_seed(0)).double()
    return GaussianMixture(
        [1 / modes] * modes, means - means.mean(0), covariance.expand(modes, d, d), event_shape=event
    )


def true_errors(model, x, plan, measure=(0.03, 0.1), points=160):
    """Of a plan's rule on the trajectories of x, by exact traces: against a far finer rule, nats (B,)."""
    fine = dataclasses.replace(
        plan, measure=dataclasses.replace(plan.measure, a=measure[0], b=measure[1]), points=points
    )
    source = RandomSource(0, "cpu", len(x))
    coarse, exact = (FlowTrajectory(model, x, p).integrate(Exact(), source).change[:, 0] for p in (plan, fine))
    return coarse - exact


def rms(values):
    return float(values.square().mean().sqrt())


@pytest.fixture(scope="module")
def smooth():
    return images((1, 4, 4), 0.3)


def test_a_survey_repeats(smooth):
    """The same seed gives the same plan, another one other probes and another measured error."""
    model = smooth.diffuse(VPSDE())
    options = dict(divergence=Hutchinson(2))
    first, second = (plan_likelihood(model, seed=3, **options) for _ in range(2))
    assert first == second
    assert plan_likelihood(model, seed=4, **options).quadrature_error != first.quadrature_error
    x = smooth.sample(8, seed=0)
    assert plan_likelihood(model, x, seed=3, **options) == plan_likelihood(model, x, seed=3, **options)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plan_likelihood(model, x, **options)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_measured_error_is_that_of_other_examples(seed, smooth):
    """Within a factor of three, on images of a smooth mixture, whose rows have similar errors."""
    model = smooth.diffuse(VPSDE())
    plan = plan_likelihood(model, smooth.sample(8, seed=5 + seed), divergence=Hadamard(8, 2), seed=seed)
    true = rms(true_errors(model, smooth.sample(32, seed=77), plan))
    assert true / 3 < plan.quadrature_error < 3 * true


@pytest.mark.parametrize(
    ("event", "scale"), [((1, 4, 4), 0.02), ((1, 6, 6), 0.02), ((3, 4, 4), 0.1)], ids=["narrow", "larger", "colour"]
)
def test_the_rule_is_as_good_as_it_has_to_be(event, scale):
    """On clouds that switch sharply, where rows differ by orders of magnitude, other examples still meet 0.01 sqrt(d) rms."""
    mixture = images(event, scale)
    model = mixture.diffuse(VPSDE())
    plan = plan_likelihood(model, divergence=Hadamard(8, 2))
    assert plan.points >= 24
    assert plan.quadrature_error <= GOAL * math.prod(event) ** 0.5
    assert rms(true_errors(model, mixture.sample(6, seed=77), plan, points=96)) < GOAL * math.prod(event) ** 0.5


def test_what_a_survey_sees_is_what_rules_do(image16):
    """The errors that it interpolates for a candidate are those that the candidate makes on the same rows."""
    model, x = image16.diffuse(VPSDE()), image16.sample(3, seed=2)
    start = dataclasses.replace(default_plan(model, 1e-4, exact=True), measure=FINE[0], points=FINE[1])
    path = FlowTrajectory(model, x, start)
    errors, _ = survey(path, Exact(), RandomSource(0, "cpu", 3))
    assert set(errors) == {(m, n) for m in MEASURES for n in POINTS}
    for candidate in ((MEASURES[4], 16), (MEASURES[11], 16), (MEASURES[0], 24)):
        plan = dataclasses.replace(start, measure=candidate[0], points=candidate[1])
        direct = true_errors(model, x, plan)
        assert rms(direct) > 1e-4
        assert rms(errors[candidate] - direct) < 0.35 * rms(direct) + 1e-5


def test_the_noise_that_a_survey_foresees(image16):
    """The variance of independent single probes at a rule's points is what repeated integrals show."""
    model, x = image16.diffuse(VPSDE()), image16.sample(1, seed=2)
    start = dataclasses.replace(default_plan(model, 1e-4, exact=True), measure=FINE[0], points=FINE[1])
    _, noise = survey(FlowTrajectory(model, x, start), Hutchinson(64), RandomSource(0, "cpu", 1))
    candidate = (MEASURES[10], 24)
    plan = dataclasses.replace(start, measure=candidate[0], points=candidate[1])
    path = FlowTrajectory(model, x.expand(400, 1, 4, 4), plan)
    change = path.integrate(Hutchinson(1), RandomSource(spawn(0, 400), "cpu", 400)).change[:, 0]
    assert float(change.var()) == pytest.approx(noise[candidate], rel=0.35)


def test_exact_traces_ask_for_the_tolerance(ring8, full3):
    """The fewest points whose errors are below the tolerance for most, more for a smaller one; log_prob keeps it."""
    for mixture in (ring8, full3):
        model, x = mixture.diffuse(VPSDE()), mixture.sample(16, seed=3)
        points = []
        for tolerance in (1e-3, 1e-5, 1e-7):
            plan = plan_likelihood(model, rtol=tolerance, atol=tolerance)
            points.append(plan.points)
            got = log_prob(model, x, rtol=tolerance, atol=tolerance, plan=plan)
            error = (got.value - model.log_prob(x, 1e-5)).abs()
            assert float(error.median()) < 20 * tolerance + 1e-6
        assert points[0] <= points[1] <= points[2]
        assert points[0] < points[2]


def test_a_plan_is_where_a_solve_starts(image16):
    """log_prob takes its grids and reports its error where the trace is estimated."""
    model, x = image16.diffuse(VPSDE()), image16.sample(4, seed=1)
    plan = plan_likelihood(model, divergence=Hutchinson(2))
    got = log_prob(model, x, divergence=Hutchinson(2), seed=0, plan=plan)
    assert (got.nfe == plan.nfe).all()
    assert (got.quadrature_error == plan.quadrature_error).all()
    bare = log_prob(model, x, divergence=Hutchinson(2), seed=0)
    assert torch.isnan(bare.quadrature_error).all()


def test_typical_examples(image16, full3):
    """The model's own draws: of its shape, repeatable, with about the data's spread."""
    for mixture in (image16, full3):
        model = mixture.diffuse(VPSDE())
        x = model_examples(model, 64, 0)
        assert x.shape == (64, *mixture.event_shape)
        assert torch.equal(x, model_examples(model, 64, 0))
        truth = mixture.covariance.diagonal() + mixture.mean.flatten() ** 2
        assert float(x.square().mean()) == pytest.approx(float(truth.mean()), rel=0.4)


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, label):
        return self.scale * x


def test_faults():
    """No examples and no shape to draw them; none at all; of the wrong shape, type or holding NaN; no model."""
    model = ScoreNet(Linear(), VPSDE(), "noise")
    with pytest.raises(ValueError, match="event_shape"):
        plan_likelihood(model)
    with pytest.raises(ValueError, match="empty"):
        plan_likelihood(model, torch.zeros(0, 2))
    with pytest.raises(ValueError, match="NaN"):
        plan_likelihood(model, torch.full((2, 2), math.nan))
    with pytest.raises(TypeError):
        plan_likelihood(model, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="ScoreModel"):
        plan_likelihood(Linear(), torch.zeros(2, 2))
    shaped = ScoreNet(Linear(), VPSDE(), "noise", event_shape=(3,))
    with pytest.raises(ValueError, match=r"\(3,\), got \(2,\)"):
        plan_likelihood(shaped, torch.zeros(2, 2))
    assert isinstance(plan_likelihood(shaped), LikelihoodPlan)
    assert isinstance(plan_likelihood(model, torch.ones(1, 2)), LikelihoodPlan)


def test_bits_per_dim_with_a_survey_does_not_depend_on_chunks(image16):
    """plan="auto" surveys the model, not the data: one batch, chunks of any size or a given plan give the same numbers."""
    model = image16.diffuse(VPSDE())
    pixels = quantize(image16.sample(7, seed=5), 256, (-1.0, 1.0)).to(torch.uint8)
    options = dict(seed=1, divergence=Hadamard(4, 2))
    whole = bits_per_dim(model, pixels, **options)
    assert torch.isfinite(whole.per_example).all()
    for size in (1, 3):
        chunked = bits_per_dim(model, pixels, batch_size=size, **options)
        torch.testing.assert_close(chunked.per_example, whole.per_example, rtol=0, atol=1e-6)
        assert torch.equal(chunked.nfe_per_example, whole.nfe_per_example)
    parts = [bits_per_dim(model, part, first=i, **options) for i, part in ((0, pixels[:4]), (4, pixels[4:]))]
    torch.testing.assert_close(torch.cat([p.per_example for p in parts]), whole.per_example, rtol=0, atol=1e-6)
    plan = plan_likelihood(model, divergence=Hadamard(4, 2), rtol=1e-4, atol=1e-4)
    given = bits_per_dim(model, pixels, plan=plan, **options)
    assert torch.equal(given.per_example, whole.per_example)
    assert given.nfe == plan.nfe
    with pytest.raises(TypeError, match="plan"):
        bits_per_dim(model, pixels, plan="best", **options)


def test_a_model_that_cannot_draw_is_scored_without_a_survey(monkeypatch, image16):
    """Where the model's own samples cannot be had, bits/dim says so and takes the default plan."""
    import scoresde.likelihood.decoupled.survey as plan

    def stiff(*args, **kwargs):
        raise RuntimeError("the ODE solve failed in 8 of 8 samples")

    model = image16.diffuse(VPSDE())
    pixels = torch.full((2, 1, 4, 4), 128)
    options = dict(levels=256, divergence=Hadamard(2, 2), rtol=1e-2, atol=1e-2)
    expected = bits_per_dim(model, pixels, plan=None, **options)
    monkeypatch.setattr(plan, "model_examples", stiff)
    with pytest.warns(UserWarning, match="no survey of the model"):
        got = bits_per_dim(model, pixels, **options)
    assert torch.equal(got.per_example, expected.per_example)
