"""Sizes that do not halve, padded inside of a network: a map of x's own shape, with exact derivatives and likelihoods."""

import pytest
import torch
import torch.nn.functional as F

from scoresde import VPSDE, Exact, ScoreNet, encode, log_prob
from scoresde.nets import DiT, LeanUNet, RefineNet, UNet
from scoresde.nets.resample import crop, pad_to_multiple

FOUR = dict(width=4, multipliers=(1, 1, 1, 1), blocks=1, group_channels=2)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def redrawn(net, scale=0.3):
    """In float64, with all parameters drawn anew."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return net.eval().double()


def network(kind, size, pad=True):
    """Each network that has the option, with resolutions or patches that do not fit 25, 27, 28 or 30."""
    lean = dict(channels=(4, 4, 4, 4), blocks=(1, 1, 1, 1), positions=2, embedding=8)
    return {
        "UNet": lambda: UNet(2, 2, size, **FOUR, attention=(4,), pad=pad),
        "progressive": lambda: UNet(
            2,
            2,
            size,
            **FOUR,
            attention=(),
            resample="fir",
            progressive_input="residual",
            progressive_output="skip",
            pad=pad,
        ),
        "LeanUNet": lambda: LeanUNet(2, 2, size, **lean, pad=pad),
        "RefineNet": lambda: RefineNet(2, size, width=2, multipliers=(1, 1, 1, 1), dilations=(1, 1, 1, 1), pad=pad),
        "DiT": lambda: DiT(2, 2, size, patch=8, width=8, depth=1, heads=2, pad=pad),
    }[kind]()


def small_model(size):
    """A tiny padded U-Net as a score model."""
    torch.manual_seed(0)
    net = UNet(1, 1, size, width=4, multipliers=(1, 1), blocks=1, attention=(), group_channels=2, pad=True)
    return ScoreNet(redrawn(net), VPSDE(), "edm")


KINDS = pytest.mark.parametrize("kind", ["UNet", "progressive", "LeanUNet", "RefineNet", "DiT"])
SIZES = pytest.mark.parametrize("size", [(28, 28), (27, 27), (25, 30)], ids=str)


@SIZES
@KINDS
def test_shape_and_derivatives(kind, size):
    """The shape of x is kept; forward and reverse mode agree, and differences."""
    net = redrawn(network(kind, size))
    x, v, u, label = (
        normal(2, 2, *size),
        normal(2, 2, *size, seed=2),
        normal(2, 2, *size, seed=3),
        torch.tensor([0.3, 0.6]),
    )
    out, forward = torch.func.jvp(lambda y: net(y, label), (x,), (v,))
    assert out.shape == x.shape
    assert bool((out.abs().amax((0, 1)) > 1e-9).all())  # to the last row and column
    y = x.clone().requires_grad_()
    reverse = torch.autograd.grad((net(y, label) * u).sum(), y)[0]
    torch.testing.assert_close((forward * u).sum(), (reverse * v).sum(), rtol=1e-9, atol=1e-11)
    if kind != "RefineNet":  # whose greatest values have no derivative where two are equal
        difference = (net(x + 1e-5 * v, label) - net(x - 1e-5 * v, label)).detach() / 2e-5
        torch.testing.assert_close(forward, difference, rtol=1e-5, atol=1e-6)


@KINDS
def test_padding_is_that_of_the_data(kind):
    """As a network without the option does for data that were padded by zeros, evenly around, and cropped by hand."""
    size, label = (27, 28), torch.tensor([0.3, 0.6])
    net, plain = redrawn(network(kind, size)), redrawn(network(kind, (32, 32), pad=False))
    plain.load_state_dict(net.state_dict())
    x = normal(2, 2, *size)
    by_hand = plain(F.pad(x, (2, 2, 2, 3)), label)[:, :, 2:-3, 2:-2]
    torch.testing.assert_close(net(x, label), by_hand)


@KINDS
def test_sizes_that_fit_are_left_alone(kind):
    """With the option and without it the same result; without it another size is refused in words that name it."""
    label = torch.tensor([0.3, 0.6])
    net, plain = redrawn(network(kind, (32, 32))), redrawn(network(kind, (32, 32), pad=False))
    x = normal(2, 2, 32, 32)
    assert torch.equal(net(x, label), plain(x, label))
    with pytest.raises(ValueError, match="pad=True"):
        network(kind, (27, 28), pad=False)


@pytest.mark.parametrize("kind", ["UNet", "progressive", "RefineNet"])
def test_every_size(kind):
    """A network without position maps takes other sizes than its own."""
    net = redrawn(network(kind, (27, 27)))
    for size in ((27, 27), (16, 33), (40, 31)):
        assert net(normal(1, 2, *size), torch.tensor([0.3])).shape == (1, 2, *size)
    with pytest.raises(ValueError, match="pad=True"):
        redrawn(network(kind, (32, 32), pad=False))(normal(1, 2, 16, 33), torch.tensor([0.3]))


@pytest.mark.parametrize("size", [(3,), (5, 3), (3, 2, 3)], ids=str)
def test_traces_are_exact(size):
    """The exact trace is that of autograd's whole Jacobian of the velocity, in the data's own dimension."""
    model = small_model(size)
    x, t = normal(2, 1, *size), torch.tensor([0.3, 0.7], dtype=torch.float64)
    d = x[0].numel()
    whole = torch.autograd.functional.jacobian(lambda y: model.velocity(y, t), x).reshape(2, d, 2, d)
    velocity, trace = Exact()(lambda y: model.velocity(y, t), x, None)
    assert velocity.shape == x.shape
    torch.testing.assert_close(trace[:, 0], torch.stack([whole[i, :, i].trace() for i in range(2)]))


def test_log_prob_is_exact():
    """The prior's density of the latent plus ln of the determinant of the map to it, by differences of that map."""
    model, x, h = small_model((3,)), normal(1, 1, 3), 1e-3
    steps = h * torch.eye(3, dtype=torch.float64)[:, None]
    ahead, behind = encode(model, torch.cat([x + steps, x - steps]), rtol=1e-6, atol=1e-6).chunk(2)
    jacobian = ((ahead - behind) / (2 * h))[:, 0]
    result = log_prob(model, x, divergence=Exact(), rtol=1e-5, atol=1e-5)
    expected = model.terminal_log_prob(result.latent) + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(result.value, expected, rtol=1e-3, atol=1e-3)
    assert float(jacobian.fill_diagonal_(0).abs().max()) > 1e-2  # no entry goes its own way


def test_padding_and_cropping():
    """Evenly around, the odd one behind; one undoes the other, and nothing is done to what fits."""
    x = torch.arange(1.0, 6).reshape(1, 1, 5)
    assert pad_to_multiple(x, (8,)).tolist() == [[[0, 1, 2, 3, 4, 5, 0, 0]]]
    assert torch.equal(crop(pad_to_multiple(x, (8,)), (5,)), x)
    y = torch.ones(2, 3, 4, 5)
    padded = pad_to_multiple(y, (3, 4))
    assert padded.shape == (2, 3, 6, 8)
    assert float(padded.sum()) == y.numel()
    assert torch.equal(crop(padded, (4, 5)), y)
    assert pad_to_multiple(y, (2, 5)) is y
    assert crop(y, (4, 5)) is y


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet(1, 1, (3, 32), **FOUR, attention=(), pad=True),
        lambda: UNet(1, 1, (4,), width=4, multipliers=(1,) * 60, blocks=1, attention=(), pad=True),
        lambda: LeanUNet(1, 1, (3,), channels=(4,) * 4, blocks=(1,) * 4, pad=True),
    ],
)
def test_more_padding_than_data_is_refused(make):
    """A size that would more than double is a mistake, or means harm."""
    with pytest.raises(ValueError, match="more than double"):
        make()
