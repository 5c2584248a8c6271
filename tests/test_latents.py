"""Latents: the round trip through the flow, spherical interpolation, and ways between two examples."""

import math

import pytest
import torch
from torch import nn

from scoresde import VPSDE, GaussianMixture, ScoreNet, decode, encode, interpolate, round_trip, slerp


def normal(*shape, seed=0, dtype=torch.float64):
    """Fixed standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def model(full3, sde):
    """An exact model without symmetry under every process that has a t_min above zero, or noise there."""
    return full3.diffuse(sde)


# -- encode and decode -----------------------------------------------------------------------------------------------


def test_round_trip(model, full3):
    """decode inverts encode and encode decode, within the tolerances."""
    x = full3.sample(3, seed=1)
    z = encode(model, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decode(model, z, rtol=1e-6, atol=1e-6), x, rtol=0, atol=1e-4)
    latent = model.sde.prior_std * normal(3, 3)
    back = encode(model, decode(model, latent, rtol=1e-7, atol=1e-7), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back / model.sde.prior_std, latent / model.sde.prior_std, rtol=0, atol=1e-3)
    loose = decode(model, encode(model, x, rtol=1e-2, atol=1e-2), rtol=1e-2, atol=1e-2)
    assert float((loose - x).abs().max()) > 1e-5  # the tolerances are used


def test_gaussian_data_are_scaled(sde):
    """On centred Gaussian data the latent is x times the ratio of the two marginals' standard deviations."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 0.4).diffuse(sde)
    x = normal(4, 2)
    ends = [math.hypot(0.4 * float(sde.alpha(t)), float(sde.sigma(t))) for t in (sde.t_min, 1.0)]
    torch.testing.assert_close(encode(model, x), x * ends[1] / ends[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decode(model, x), x * ends[0] / ends[1], rtol=1e-6, atol=1e-6)


def test_latents_of_data_look_like_the_prior(full3):
    """Encoded data have the prior's mean and covariance, up to what 400 draws show."""
    z = encode(full3.diffuse(VPSDE()), full3.sample(400, seed=2))
    assert float(z.mean(0).abs().max()) < 4 / math.sqrt(400)
    assert float((z.T.cov() - torch.eye(3)).abs().max()) < 4 * math.sqrt(2 / 400)


# -- slerp -----------------------------------------------------------------------------------------------------------


def test_slerp_ends_and_norms():
    """The ends are exact; between vectors of one norm every point has that norm, at the angle that the weight says."""
    a, b = normal(6, 2, 5, seed=1), normal(6, 2, 5, seed=2)
    torch.testing.assert_close(slerp(a, b, 0.0), a, rtol=0, atol=0)
    torch.testing.assert_close(slerp(a, b, 1.0), b, rtol=1e-12, atol=1e-12)
    unit = [3 * v / v.flatten(1).norm(dim=1)[:, None, None] for v in (a, b)]
    omega = torch.acos((unit[0] * unit[1]).flatten(1).sum(1) / 9)
    for w in (0.1, 0.5, 0.8):
        c = slerp(*unit, w)
        torch.testing.assert_close(c.flatten(1).norm(dim=1), torch.full((6,), 3.0, dtype=torch.float64))
        torch.testing.assert_close(torch.acos((c * unit[0]).flatten(1).sum(1) / 9), w * omega, rtol=1e-9, atol=1e-9)
    straight = 0.5 * (unit[0] + unit[1])
    assert float(straight.flatten(1).norm(dim=1).max()) < 2.9  # the norm that a straight line loses


def test_slerp_is_symmetric_and_rotates():
    """The way back is the same way, and a rotation of both ends rotates it."""
    a, b = normal(4, 3, seed=3), normal(4, 3, seed=4)
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(b, a, 0.7))
    q = torch.linalg.qr(normal(3, 3, seed=5))[0]
    torch.testing.assert_close(slerp(a @ q, b @ q, 0.3), slerp(a, b, 0.3) @ q)
    quarter = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 0.5)
    torch.testing.assert_close(quarter, torch.tensor([[math.sqrt(0.5), math.sqrt(2)]]))


def test_slerp_row_by_row():
    """An example's path depends on its own two ends and its own weight alone."""
    a, b = normal(5, 4, seed=6), normal(5, 4, seed=7)
    w = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    whole = slerp(a, b, w)
    for i in range(5):
        torch.testing.assert_close(slerp(a[i : i + 1], b[i : i + 1], float(w[i]))[0], whole[i], rtol=1e-14, atol=1e-14)
    assert slerp(a.float(), b.float(), w).dtype == torch.float32
    assert slerp(a.float(), b.float(), w.float()).dtype == torch.float32


def test_slerp_of_parallel_vectors():
    """Equal, scaled, zero and all but parallel vectors are joined by the straight line, without a division by zero."""
    a = normal(3, 4, seed=8)
    torch.testing.assert_close(slerp(a, a, 0.37), a)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    torch.testing.assert_close(slerp(a, a + 1e-12, 0.5), a, rtol=0, atol=1e-10)
    for size in (1e-3, 1e-5, 1e-7):  # across the switch to the straight line
        near = a + size * normal(3, 4, seed=9)
        torch.testing.assert_close(slerp(a, near, 0.25), 0.75 * a + 0.25 * near, rtol=0, atol=2 * size**2)
    zero = torch.zeros_like(a)
    assert torch.equal(slerp(zero, zero, 0.5), zero)
    assert torch.isfinite(slerp(zero, a, 0.5)).all()


def test_slerp_errors():
    """Opposite rows are named; other shapes and kinds are refused."""
    a, b = normal(4, 3, seed=10), normal(4, 3, seed=11)
    b[1], b[3] = -a[1], -2 * a[3]
    with pytest.raises(ValueError, match=r"rows \[1, 3\] are opposite"):
        slerp(a, b, 0.5)
    assert torch.isfinite(slerp(a[:1], b[:1], 0.5)).all()
    with pytest.raises(ValueError, match="b has shape"):
        slerp(a, b[:2], 0.5)
    with pytest.raises(TypeError, match="a must"):
        slerp([[1.0]], b, 0.5)
    with pytest.raises(TypeError, match="b must"):
        slerp(a, b.long(), 0.5)


# -- interpolate -----------------------------------------------------------------------------------------------------


def test_interpolate_is_slerp_of_latents(model, full3):
    """(W, B, *) with the two examples at the ends; between them decode(slerp(encode, encode))."""
    x = full3.sample(4, seed=3)
    path = interpolate(model, x[:2], x[2:], [0.0, 0.25, 1.0], rtol=1e-6, atol=1e-6)
    assert path.shape == (3, 2, 3)
    torch.testing.assert_close(path[0], x[:2], rtol=0, atol=1e-4)
    torch.testing.assert_close(path[2], x[2:], rtol=0, atol=1e-4)
    z = encode(model, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(path[1], decode(model, slerp(z[:2], z[2:], 0.25), rtol=1e-6, atol=1e-6))


def test_how_many_weights(full3):
    """A number stands for as many equally spaced weights; 1 gives the first example, 8 are the default."""
    model, x = full3.diffuse(VPSDE()), full3.sample(2, seed=4)
    loose = dict(rtol=1e-3, atol=1e-3)
    path = interpolate(model, x[:1], x[1:], 3, **loose)
    torch.testing.assert_close(path, interpolate(model, x[:1], x[1:], [0.0, 0.5, 1.0], **loose))
    torch.testing.assert_close(interpolate(model, x[:1], x[1:], 1, **loose)[0], x[:1], rtol=0, atol=0.05)
    assert interpolate(model, x[:1], x[1:], **loose).shape == (8, 1, 3)


def test_images(image16):
    """The event's shape is kept, in float32 for float32 examples."""
    model, x = image16.diffuse(VPSDE()), image16.sample(2, seed=5).float()
    path = interpolate(model, x[:1], x[1:], 4)
    assert path.shape == (4, 1, 1, 4, 4)
    assert path.dtype == torch.float32
    assert torch.isfinite(path).all()


class Pulled(nn.Module):
    """A denoiser around a centre, which is the condition; counts what it is given."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x, label, cond):
        assert not self.drop.training
        return self.drop(0.3 * torch.tanh(x - cond) + cond)


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"to": c}], ids=["tensor", "dict"])
def test_conditions(wrap):
    """Every example keeps its condition on its whole way, and the training mode comes back."""

    class Net(Pulled):
        def forward(self, x, label, cond):
            return super().forward(x, label, cond["to"] if isinstance(cond, dict) else cond)

    model = ScoreNet(Net(), VPSDE(), "denoise").train()
    cond = torch.tensor([[0.0], [1.0], [-2.0]])
    x0, x1 = (
        cond + normal(3, 2, seed=12, dtype=torch.float32) / 5,
        cond + normal(3, 2, seed=13, dtype=torch.float32) / 5,
    )
    loose = dict(rtol=1e-3, atol=1e-3)
    path = interpolate(model, x0, x1, 3, cond=wrap(cond), **loose)
    assert model.training
    assert model.net.drop.training
    torch.testing.assert_close(path[0], x0, rtol=0, atol=5e-2)
    torch.testing.assert_close(path[-1], x1, rtol=0, atol=5e-2)
    for i in range(3):
        alone = interpolate(model, x0[i : i + 1], x1[i : i + 1], 3, cond=wrap(cond[i : i + 1]), **loose)
        torch.testing.assert_close(alone[:, 0], path[:, i], rtol=0, atol=1e-4)
    other = decode(model, encode(model, x0, cond=wrap(cond), **loose), cond=wrap(cond + 0.5), **loose)
    assert float((other - x0).abs().max()) > 0.1


def test_errors(full3):
    """Weights outside [0, 1] or none, shapes that differ, NaN, conditions without a row per example."""
    model, x = full3.diffuse(VPSDE()), full3.sample(4, seed=6)
    for weights in ([], [0.5, 1.2], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match=r"weights must be numbers in \[0, 1\]"):
            interpolate(model, x[:2], x[2:], weights)
    with pytest.raises(ValueError, match="weights must be at least 1"):
        interpolate(model, x[:2], x[2:], 0)
    with pytest.raises(ValueError, match="x1 has shape"):
        interpolate(model, x[:2], x[2:3])
    with pytest.raises(ValueError, match=r"x0 holds NaN or infinity.*\[1\]"):
        interpolate(model, torch.where(torch.arange(4)[:, None] == 1, math.nan, x), x)
    with pytest.raises(ValueError, match="made for examples of shape"):
        interpolate(model, x[:, :2], x[:, :2])
    net = ScoreNet(Pulled(), VPSDE(), "denoise")
    with pytest.raises(ValueError, match="one row per example"):
        interpolate(net, torch.zeros(2, 2), torch.ones(2, 2), cond=torch.zeros(3, 1))
    with pytest.raises(TypeError, match="must be a ScoreModel"):
        interpolate(nn.Linear(2, 2), x, x)


def test_nan_in_the_second_example(full3):
    """It is named as x1."""
    model, x = full3.diffuse(VPSDE()), full3.sample(2, seed=7)
    with pytest.raises(ValueError, match="x1"):
        interpolate(model, x, torch.full_like(x, math.nan), 2)


def test_round_trip_reports_its_error(ring8):
    """The latents are encode's; the error is that of decode(encode(x)), per example, and falls with the tolerance."""
    model, x = ring8.diffuse(VPSDE()), ring8.sample(8, seed=1)
    z, error = round_trip(model, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(z, encode(model, x, rtol=1e-4, atol=1e-4))
    expected = (decode(model, z, rtol=1e-4, atol=1e-4) - x).square().mean(1).sqrt()
    torch.testing.assert_close(error, expected)
    assert (error > 0).all()
    finer = round_trip(model, x, rtol=1e-8, atol=1e-8)[1]
    assert float(finer.max()) < 1e-2 * float(error.max())
