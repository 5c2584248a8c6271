"""The networks: shapes, the zero start, conditions, derivatives in both modes, and what their config rebuilds."""

import pytest
import torch

from scoresde.nets import MLP, NETS, LeanUNet
from scoresde.nets.embedding import NoiseEmbedding
from scoresde.nets.lean import AttentionBlock

SMALL = dict(channels=(8, 16), blocks=(1, 2), embedding=16, positions=2)
SIZES = {"1D": (8,), "2D": (4, 6), "3D": (2, 4, 2)}


def unet(size, in_channels=2, out_channels=3, seed=0, **options):
    torch.manual_seed(seed)
    return LeanUNet(in_channels, out_channels, size, **(SMALL | options)).eval()


def mlp(dim=5, seed=0, **options):
    torch.manual_seed(seed)
    return MLP(dim, **(dict(width=16, depth=2, embedding=8) | options)).eval()


def shaken(net, seed=1, scale=0.2):
    """The network with all parameters moved, so that no block is the identity any more."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g).to(p.dtype))
    return net


def inputs(shape, dtype=torch.float32, seed=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype), torch.randn(shape[0], generator=g)


def kinds(**options):
    """(network, shape of x) for an MLP and a U-Net of each rank."""
    cases = [(mlp(**options), (3, 5))]
    return cases + [(unet(size, in_channels=2, out_channels=2, **options), (3, 2, *size)) for size in SIZES.values()]


KIND_IDS = ["MLP", *(f"LeanUNet-{k}" for k in SIZES)]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_unet_shapes_and_zero_start(size):
    """(B, in, *size) -> (B, out, *size), exactly zero at the start, and not once the weights have moved."""
    net = unet(size)
    x, label = inputs((5, 2, *size))
    out = net(x, label)
    assert tuple(out.shape) == (5, 3, *size)
    assert torch.equal(out, torch.zeros_like(out))
    assert float(shaken(net)(x, label).detach().abs().max()) > 1e-3


def test_mlp_shape_and_zero_start():
    """(B, dim) -> (B, dim), zero at the start."""
    net = mlp()
    x, label = inputs((4, 5))
    out = net(x, label)
    assert torch.equal(out, torch.zeros(4, 5))
    assert float(shaken(net)(x, label).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    "options", [dict(attention=False), dict(positions=0), dict(channels=(8,), blocks=(2,))], ids=str
)
def test_unet_without_its_optional_parts(options):
    """No attention, no position maps, a single resolution: each still runs and depends on its input."""
    net = shaken(unet((4, 4), **options))
    x, label = inputs((2, 2, 4, 4))
    out = net(x, label)
    assert tuple(out.shape) == (2, 3, 4, 4)
    assert float((net(2 * x, label) - out).detach().abs().max()) > 1e-4


def test_position_maps_and_attention_see_where_a_pixel_is():
    """With position maps a constant image has an output that varies in the middle; with none and no attention, not."""
    flat = torch.ones(1, 2, 16)
    interior = slice(7, 9)
    for positions, varies in [(4, True), (0, False)]:
        net = shaken(unet((16,), positions=positions, attention=False, channels=(8,), blocks=(1,)))
        out = net(flat, torch.zeros(1))[0, :, interior].detach()
        assert bool((out[:, 0] - out[:, 1]).abs().max() > 1e-4) == varies


@pytest.mark.parametrize("kind", range(4), ids=KIND_IDS)
def test_conditions(kind):
    """A missing condition counts as zeros, another one changes the output, a wrong shape is named."""
    net, shape = kinds(cond_dim=7)[kind]
    shaken(net)
    x, label = inputs(shape)
    cond = torch.randn(shape[0], 7, generator=torch.Generator().manual_seed(3))
    without = net(x, label)
    torch.testing.assert_close(net(x, label, torch.zeros(shape[0], 7)), without)
    with_cond = net(x, label, cond)
    assert float((with_cond - without).detach().abs().flatten(1).max(1).values.min()) > 1e-4
    for bad in (cond[:, :6], cond[:1], cond[0]):
        with pytest.raises(ValueError, match=rf"cond must have shape \({shape[0]}, 7\)"):
            net(x, label, bad)


@pytest.mark.parametrize("kind", range(4), ids=KIND_IDS)
def test_a_condition_for_a_network_without_one_is_refused(kind):
    """It is not dropped silently."""
    net, shape = kinds()[kind]
    x, label = inputs(shape)
    with pytest.raises(ValueError, match="without conditions"):
        net(x, label, torch.zeros(shape[0], 7))


@pytest.mark.parametrize("kind", range(4), ids=KIND_IDS)
def test_examples_do_not_mix(kind):
    """Row i of the output depends on row i of x, label and nothing else."""
    net, shape = kinds()[kind]
    shaken(net)
    x, label = inputs(shape)
    out = net(x, label)
    for i in range(shape[0]):
        torch.testing.assert_close(net(x[i : i + 1], label[i : i + 1]), out[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", range(4), ids=KIND_IDS)
def test_the_label_changes_the_output(kind):
    """Different noise labels give different outputs once the weights have moved."""
    net, shape = kinds()[kind]
    shaken(net)
    x, _ = inputs(shape)
    x = x[:1].expand(shape).contiguous()
    out = net(x, torch.tensor([-1.0, 0.3, 1.1])).detach()
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert float((out[i] - out[j]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", range(4), ids=KIND_IDS)
def test_forward_and_reverse_derivatives_agree(kind):
    """u^T (J v) by forward mode equals (u^T J) v by reverse mode, and central differences."""
    net, shape = kinds()[kind]
    shaken(net).double()
    x, label = inputs(shape, torch.float64)
    label = label.double()
    g = torch.Generator().manual_seed(4)
    u, v = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    _, forward = torch.func.jvp(lambda y: net(y, label), (x,), (v,))
    _, pullback = torch.func.vjp(lambda y: net(y, label), x)
    reverse = pullback(u)[0]
    torch.testing.assert_close((u * forward).sum(), (reverse * v).sum(), rtol=1e-9, atol=1e-9)
    step = 1e-5
    difference = (net(x + step * v, label) - net(x - step * v, label)) / (2 * step)
    torch.testing.assert_close(forward, difference.detach(), rtol=1e-5, atol=1e-6)


def test_second_derivatives_exist():
    """Forward over reverse, through the attention too: what differentiable likelihoods and sliced matching need."""
    net = shaken(unet((4,), in_channels=1, out_channels=1)).double()
    x, label = inputs((2, 1, 4), torch.float64)
    v = torch.ones_like(x)

    def gradient(y):
        return torch.func.grad(lambda z: net(z, label.double()).square().sum())(y)

    _, curvature = torch.func.jvp(gradient, (x,), (v,))
    difference = (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(curvature, difference.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", range(4), ids=KIND_IDS)
def test_other_dtypes(kind, dtype):
    """bfloat16 and float64 networks answer in their dtype, close to float32; the label may stay float32."""
    net, shape = kinds(cond_dim=2)[kind]
    shaken(net)
    x, label = inputs(shape)
    cond = torch.ones(shape[0], 2)
    expected = net(x, label, cond).detach()
    out = net.to(dtype)(x.to(dtype), label, cond).detach()
    assert out.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    scale = float(expected.abs().max())
    torch.testing.assert_close(out.float(), expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("kind", range(4), ids=KIND_IDS)
def test_config_rebuilds_the_network(kind):
    """type(net)(**net.config) takes the weights and gives the same output."""
    net, shape = kinds(cond_dim=3, dropout=0.2)[kind]
    shaken(net)
    again = NETS[type(net).__name__](**net.config).eval()
    assert again.config == net.config
    again.load_state_dict(net.state_dict())
    x, label = inputs(shape)
    assert torch.equal(again(x, label), net(x, label))


def test_dropout_acts_in_training_only():
    """Two passes differ in training mode and are equal in evaluation mode."""
    for net, shape in kinds(dropout=0.5)[:3]:
        shaken(net)
        x, label = inputs(shape)
        assert torch.equal(net(x, label), net(x, label))
        net.train()
        torch.manual_seed(0)
        assert not torch.equal(net(x, label), net(x, label))


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((7, 8), {}, "cannot be halved 1 times"),
        ((6,), dict(channels=(8, 8, 8), blocks=(1, 1, 1)), "cannot be halved 2 times"),
        ((2, 2, 2, 2), {}, "1, 2 or 3 spatial axes"),
        ((), {}, "1, 2 or 3 spatial axes"),
        ((8,), dict(blocks=(1,)), "one entry per resolution"),
        ((8,), dict(channels=(), blocks=()), "one entry per resolution"),
        ((8,), dict(dropout=1.0), "dropout"),
        ((8,), dict(dropout=-0.1), "dropout"),
    ],
)
def test_unet_bad_arguments(size, options, message):
    """Sizes that do not halve, ranks, missing entries and impossible dropout are refused when it is built."""
    with pytest.raises(ValueError, match=message):
        unet(size, **options)


def test_attention_needs_a_multiple_of_its_heads():
    """Said when it is built, with both numbers."""
    with pytest.raises(ValueError, match=r"\(6\) must be a multiple of heads \(4\)"):
        AttentionBlock(6, 8, 4, 0.0)


def test_noise_labels_that_a_schedule_uses_are_told_apart():
    """Labels 0.02 apart, a log-SNR of 0.16, differ clearly in the embedding; the fixed frequencies are saved."""
    torch.manual_seed(0)
    embed = NoiseEmbedding(16)
    assert "frequencies" in embed.state_dict()
    label = torch.arange(-1.2, 1.2, 0.02)
    angle = label[:, None] * embed.frequencies
    features = torch.cat([angle.sin(), angle.cos()], 1)
    distance = torch.cdist(features, features) + 10 * torch.eye(len(label))
    assert float(distance.min()) > 0.3
