"""Networks as denoisers: the five parameterizations, checked with networks that give the exact answer."""

import pytest
import torch
from torch import nn

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    RectifiedFlow,
    ScoreModel,
    ScoreNet,
    conditions,
    denoising_loss,
    log_prob,
    sample,
)
from scoresde.models.network import PARAMETERIZATIONS, NoiseLabel
from scoresde.samplers import ProbabilityFlow
from scoresde.sde import expand


class Oracle(nn.Module):
    """What a perfectly trained network of the given parameterization would return for a mixture's denoiser."""

    def __init__(self, truth, parameterization, sigma_data):
        super().__init__()
        self.truth, self.kind, self.sigma_data = [truth], parameterization, sigma_data

    def forward(self, x, label):
        truth, label, wide = self.truth[0], label.double(), x.double()
        if self.kind == "edm":  # Karras et al. 2022, table 1, in y = x / alpha and s = sigma / alpha
            s = torch.exp(4 * label)
            t = truth.sde.time(-8 * label).clamp(0, 1)
            alpha = truth.sde.alpha(t)
            c_in = 1 / torch.sqrt(s**2 + self.sigma_data**2)
            y = wide / expand(c_in, x).double()
            c_skip = self.sigma_data**2 / (s**2 + self.sigma_data**2)
            c_out = s * self.sigma_data / torch.sqrt(s**2 + self.sigma_data**2)
            denoised, score = truth.denoise(expand(alpha, wide) * y, t), truth.score(expand(alpha, wide) * y, t)
            # D - c_skip y; where s is small that is a small difference, exact from D = y + s^2 alpha score
            small = expand(s**2 / (s**2 + self.sigma_data**2), wide) * y + expand(s**2 * alpha, wide) * score
            out = torch.where(expand(s < 1, wide).bool(), small, denoised - expand(c_skip, wide) * y)
            return (out / expand(c_out, wide)).to(x.dtype)
        if self.kind == "scaled_score":
            return -truth.noise(wide, label).to(x.dtype)
        if self.kind == "v_prediction":
            alpha, sigma = (expand(c(label), wide) for c in (truth.sde.alpha, truth.sde.sigma))
            return (alpha * truth.noise(wide, label) - sigma * truth.denoise(wide, label)).to(x.dtype)
        return getattr(truth, self.kind)(wide, label).to(x.dtype)


def problem(sde, full3, parameterization, dtype, last=None):
    """(truth, network under test, x, t): exact samples of p_t at t_min, small, middle and large t."""
    truth = full3.diffuse(sde)
    model = ScoreNet(Oracle(truth, parameterization, 1.3), sde, parameterization, sigma_data=1.3)
    t = torch.tensor([max(sde.t_min, 1e-5), 1e-3, 0.05, 0.5, 0.9, sde.t_max if last is None else last])
    t = t.repeat_interleave(8).double()  # of float32 precision, so that the label a float32 network gets is exact
    x0 = full3.sample(t.numel(), seed=1)
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return truth, model, sde.perturb(x0, t, z).to(dtype), t


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_parameterizations_agree_with_the_exact_model(sde, full3, parameterization, dtype):
    """denoise, noise, score and velocity follow from each kind of output, to the precision that the kind allows.

    The errors allowed are multiples of the machine epsilon. Where a quantity is not determined better by the
    network's output (the denoiser from the noise where sigma >> alpha, the noise from the denoiser where
    sigma << alpha) they grow by just that ratio; `edm` is exact at both ends.
    """
    truth, model, x, t = problem(sde, full3, parameterization, dtype)
    wide = x.double()
    alpha, sigma = (expand(c, wide) for c in (sde.alpha(t), sde.sigma(t)))
    alpha_dot, sigma_dot = (expand(c, wide) for c in (sde.alpha_dot(t), sde.sigma_dot(t)))
    eps = (
        60 * torch.finfo(dtype).eps * (1 + 40 * (dtype == torch.float64))
    )  # 3e-13 float64 schedule rounding at the ends
    of_denoise = eps * (
        1 + (sigma / alpha if parameterization in ("noise", "score", "scaled_score", "velocity") else 0)
    )
    of_noise = eps * (1 + (alpha / sigma if parameterization == "denoise" else 0))
    scale = 1 + truth.denoise(wide, t).abs().amax(1, keepdim=True)

    def check(got, expected, tolerance):
        assert got.dtype == dtype
        error = (got.double() - expected).abs() / (tolerance * scale)
        assert float(error.max()) < 1, (
            f"{float(error.max()):.3g} times the tolerance at t = {t[error.amax(1).argmax()]:.3g}"
        )

    check(model.denoise(x, t), truth.denoise(wide, t), of_denoise)
    check(model.noise(x, t), truth.noise(wide, t), of_noise)
    denoised, noise = model.predict(x, t)
    check(denoised, truth.denoise(wide, t), of_denoise)
    check(noise, truth.noise(wide, t), of_noise)
    check(model.score(x, t), truth.score(wide, t), of_noise / sigma)
    check(model.velocity(x, t), truth.velocity(wide, t), alpha_dot.abs() * of_denoise + sigma_dot.abs() * of_noise)


@pytest.mark.parametrize("parameterization", ["denoise", "velocity", "edm"])
def test_rectified_flow_at_its_very_end(full3, parameterization):
    """At t = 1, where alpha = 0, the three parameterizations that are defined there are exact."""
    truth, model, x, t = problem(RectifiedFlow(), full3, parameterization, torch.float64, last=1.0)
    if parameterization == "edm":  # its label, ln(sigma/alpha)/4, is only large: the answer is the data's mean
        x, t = x[-8:], torch.ones(8, dtype=torch.float64)
        model.net = Constant(0.0)
        torch.testing.assert_close(model.denoise(x, t), torch.zeros_like(x), rtol=0, atol=1e-12)
        return
    torch.testing.assert_close(model.denoise(x, t), truth.denoise(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.noise(x, t)[-8:], x[-8:], rtol=1e-9, atol=1e-9)


class Constant(nn.Module):
    """A network that returns one number everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, label):
        return torch.full_like(x, self.value)


class Spy(nn.Module):
    """-x/2, keeping what it was called with; parameters of the given dtype."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-0.5, dtype=dtype))
        self.calls = []

    def forward(self, x, *rest):
        self.calls.append((x, *rest))
        return self.weight * x


def test_what_each_parameterization_is_given():
    """x and t as they are; for edm the scaled x and ln(sigma/alpha)/4, with sigma_data."""
    sde, x = VESDE(), torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    t = torch.tensor([0.25, 0.75])
    for parameterization in PARAMETERIZATIONS:
        spy = Spy()
        ScoreNet(spy, sde, parameterization, sigma_data=0.5).denoise(x, t)
        given_x, label = spy.calls[0]
        assert label.shape == (2,)
        if parameterization == "edm":
            s = sde.sigma(t.double())
            torch.testing.assert_close(label, (s.log() / 4).float())
            torch.testing.assert_close(given_x, (x / (s**2 + 0.25).sqrt()[:, None]).float())
        else:
            assert torch.equal(given_x, x)
            assert torch.equal(label, t)


def test_scalar_time_is_given_to_every_row():
    """A float, a 0-d tensor and a vector of equal times mean the same; the network sees one label per row."""
    x = torch.ones(3, 2)
    spy = Spy()
    model = ScoreNet(spy, VPSDE(), "noise")
    a, b, c = (model.denoise(x, t) for t in (0.5, torch.tensor(0.5), torch.full((3,), 0.5)))
    assert torch.equal(a, b)
    assert torch.equal(a, c)
    assert all(call[1].shape == (3,) for call in spy.calls)


class Wrong(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, label):
        return self.answer(x)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_networks_of_the_wrong_shape_or_kind(parameterization):
    """Both shapes are named, also where broadcasting would have hidden the fault."""
    x, sde = torch.zeros(4, 3, 8, 8), VPSDE()
    for answer, shape in (
        (lambda x: x[:, :1], r"\(4, 1, 8, 8\)"),
        (lambda x: x[:1], r"\(1, 3, 8, 8\)"),
        (lambda x: x.flatten(1), r"\(4, 192\)"),
        (lambda x: torch.cat([x, x], 1), r"\(4, 6, 8, 8\)"),
    ):
        model = ScoreNet(Wrong(answer), sde, parameterization)
        for call in (model.denoise, model.noise, model.score, model.velocity, model.predict):
            with pytest.raises(ValueError, match=shape + r".*\(4, 3, 8, 8\)"):
                call(x, 0.5)
    model = ScoreNet(Wrong(lambda x: (x, x)), sde, parameterization)
    with pytest.raises(TypeError, match="tensor, got tuple"):
        model.denoise(x, 0.5)


def test_construction_errors():
    """Unknown parameterizations are listed against; sigma_data is positive; ScoreModel is abstract."""
    with pytest.raises(ValueError, match="noise, score, denoise, velocity, edm"):
        ScoreNet(Spy(), VPSDE(), "eps")
    with pytest.raises(ValueError, match="time, sigma, log_sigma"):
        NoiseLabel("log_snr")
    with pytest.raises(TypeError, match="NoiseLabel"):
        ScoreNet(Spy(), VPSDE(), label="time")
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma_data"):
            ScoreNet(Spy(), VPSDE(), sigma_data=bad)
    with pytest.raises(TypeError, match="abstract"):
        ScoreModel()


def test_inputs_are_checked():
    """Integer x, no batch axis, t of another length and t outside [0, 1]."""
    model = ScoreNet(Spy(), VPSDE())
    for call in (model.denoise, model.noise, model.score, model.velocity, model.predict):
        with pytest.raises(TypeError, match="floating"):
            call(torch.zeros(2, 2, dtype=torch.uint8), 0.5)
        with pytest.raises(ValueError, match="batch axis"):
            call(torch.zeros(2), 0.5)
        with pytest.raises(ValueError, match=r"\(2,\)"):
            call(torch.zeros(2, 2), torch.tensor([0.1, 0.2, 0.3]))
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call(torch.zeros(2, 2), 1.5)
    with pytest.raises(TypeError, match="torch tensor"):
        model.denoise([[0.0]], 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_low_precision_networks(dtype, parameterization):
    """The network computes in its own dtype; labels, coefficients and results stay float32 (bf16 rounds 0.9995 to 1)."""
    spy = Spy(dtype)
    model = ScoreNet(spy, VPSDE(), parameterization)
    x = torch.linspace(-2, 2, 8).reshape(4, 2)
    t = torch.full((4,), 0.9995)
    for call in (model.denoise, model.noise, model.score, model.velocity):
        assert call(x, t).dtype == torch.float32
    given_x, label = spy.calls[0]
    assert given_x.dtype == dtype
    assert label.dtype == torch.float32
    if parameterization != "edm":
        assert torch.equal(label, t)
    for method in ("pc", "heun", ProbabilityFlow(rtol=0.1, atol=0.1)):
        assert sample(model, (2, 2), method=method, steps=3, seed=0).dtype == torch.float32
    assert denoising_loss(model, x, seed=0).dtype == torch.float32
    result = log_prob(model, x, rtol=0.1, atol=0.1, max_nfe=100)
    assert result.latent.dtype == torch.float32
    assert result.value.dtype == torch.float64


def test_float64_networks_solve_in_float64():
    """A float64 network keeps float64 all the way, labels included."""
    spy = Spy(torch.float64)
    x = sample(ScoreNet(spy, VPSDE(), "noise"), (2, 2), method="ddim", steps=2, seed=0)
    assert x.dtype == torch.float64
    assert spy.calls[0][1].dtype == torch.float64


class Conditional(nn.Module):
    """cond pulls each row its own way; works with a tensor, a dict or a tuple."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, label, cond):
        self.seen.append(cond)
        pull = cond["to"] if isinstance(cond, dict) else cond[0] if isinstance(cond, tuple) else cond
        return 0.9 * x + 0.1 * pull


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"to": c}, lambda c: (c,)], ids=["tensor", "dict", "tuple"])
@pytest.mark.parametrize("method", ["pc", "ode", "ddim", "heun"])
def test_conditions_reach_the_network_row_by_row(wrap, method):
    """Each row is sampled under its own condition, also where the ODE solver drops finished rows."""
    net = Conditional()
    model = ScoreNet(net, VPSDE(), "noise")
    cond = torch.tensor([[1.0, 0.0], [100.0, -50.0], [0.0, 0.0]])
    steps = None if method == "ode" else 5
    together = sample(model, (3, 2), method=method, steps=steps, seed=[1, 2, 3], cond=wrap(cond))
    assert type(net.seen[0]) is type(wrap(cond))
    for i in range(3):
        alone = sample(model, (1, 2), method=method, steps=steps, seed=[i + 1], cond=wrap(cond[i : i + 1]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-4)
    value = log_prob(model, torch.zeros(3, 2), cond=wrap(cond)).value
    alone = log_prob(model, torch.zeros(1, 2), cond=wrap(cond[1:2])).value
    torch.testing.assert_close(alone[0], value[1], rtol=1e-6, atol=1e-6)


def test_conditions_that_cannot_be_split():
    """A condition without rows is an error where rows have to be taken; None stays None."""
    assert conditions.take_rows(None, torch.tensor([0])) is None
    with pytest.raises(TypeError, match="cond must be"):
        conditions.take_rows("a cat", torch.tensor([0]))


def test_no_condition_means_two_arguments():
    """Without cond the network is called as net(x, label)."""
    spy = Spy()
    ScoreNet(spy, VPSDE()).denoise(torch.zeros(2, 2), 0.5)
    assert len(spy.calls[0]) == 2


def test_float16_network_on_a_wide_schedule():
    """sigma_max = 1348 overflows float16 arithmetic on sigma^2; the schedule is not computed there."""
    model = ScoreNet(Spy(torch.float16), EDMSDE(sigma_max=1348.0), "edm", sigma_data=0.5)
    x = sample(model, (4, 3), method="heun", steps=6, seed=0)
    assert torch.isfinite(x).all()
    x = torch.full((2, 2), 1348.0)
    assert torch.isfinite(model.denoise(x, 1.0)).all()
    assert torch.isfinite(model.score(x, 1.0)).all()
