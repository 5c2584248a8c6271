"""The U-Net: published sizes, every option, resampling against SciPy, derivatives in both modes, layouts and dtypes."""

import functools
import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import upfirdn
from torch.autograd import forward_ad

from scoresde.nets import MLP, LeanUNet, UNet
from scoresde.nets.blocks import ResBlock, SelfAttention
from scoresde.nets.resample import ConvDown, ConvUp, Down, Up
from scoresde.nets.unet import CHOICES

SMALL = dict(width=8, multipliers=(1, 2), blocks=1, attention=(2,))
SIZES = {"1D": (4,), "2D": (2, 4), "3D": (2, 2, 4)}
RANKS = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
F64 = torch.float64
TAPS = pytest.mark.parametrize(
    "taps", [(1, 3, 3, 1), (1, 2, 1), (1, 1), (1, 2, 3, 4), (3, -1), (1, 2, 3, 4, 5)], ids=str
)
FULL = dict(resample="fir", progressive_input="residual", progressive_output="skip", embedding="fourier", classes=3)
OTHER = dict(residual="ddpm", resample="conv", modulation="scale_shift", attention_up="all", progressive_input="skip")
OTHER |= dict(progressive_combine="cat", progressive_output="residual", heads=2, rescale_skips=False, cond_dim=2)
PLAIN = dict(multipliers=(1,), attention=(4,), classes=3)
BOTH = pytest.mark.parametrize("options", [FULL, OTHER], ids=["full", "other"])


def unet(size=(4, 4), c_in=2, c_out=2, seed=0, **options):
    torch.manual_seed(seed)
    return UNet(c_in, c_out, size, **(SMALL | options)).eval()


def redrawn(net, scale=0.2):
    """The network with all parameters drawn anew, so that nothing is zero or the identity."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return net


def normal(*shape, seed=2, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(batch, *shape, dtype=torch.float32):
    return normal(batch, *shape, dtype=dtype), torch.linspace(0.1, 0.9, batch, dtype=dtype)


def condition(options, batch):
    return torch.arange(batch) % 3 if "classes" in options else normal(batch, 2) if "cond_dim" in options else None


NCSNPP = dict(resample="fir", progressive_input="residual")
VE = dict(blocks=2, resample="fir", progressive_input="skip", progressive_output="skip", embedding="fourier")
DDPM = dict(blocks=2, residual="ddpm", resample="conv", rescale_skips=False, group_channels=1)
ADM = dict(width=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), attention_up="all", head_channels=64)
ADM |= dict(project_resampled=False, modulation="scale_shift", rescale_skips=False, eps=1e-5, join="output")
PUBLISHED = {
    "DDPM++ cont.": (32, {}, 61_804_419),
    "NCSN++ cont. VE": (32, NCSNPP | dict(embedding="fourier"), 62_758_787),
    "NCSN++ cont. VP": (32, NCSNPP, 62_693_251),
    "DDPM++ cont. deep": (32, dict(blocks=8), 106_632_579),
    "NCSN++ cont. deep VE": (32, NCSNPP | dict(blocks=8, embedding="fourier"), 107_586_947),
    "DDPM": (32, DDPM, 35_218_947),
    "NCSN++ 256": (256, VE | dict(multipliers=(1, 1, 2, 2, 2, 2, 2)), 65_574_421),
    "NCSN++ 1024": (1024, VE | dict(blocks=1, width=16, multipliers=(1, 2, 4, 8, 16, 32, 32, 32)), 105_785_880),
    "EDM's DDPM++": (32, dict(multipliers=(2, 2, 2)), 55_732_739),
    "ADM 64": (64, ADM | dict(classes=1000), 295_899_267 + 768),  # and the row for no class
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """The number of trainable parameters of the networks in the papers, exactly."""
    side, options, count = PUBLISHED[name]
    with torch.device("meta"):
        net = UNet(3, 3, (side, side), **options)
    assert sum(p.numel() for p in net.parameters()) == count


def fits(o):
    """Whether these choices go together; how a skip is combined counts only where there is one."""
    resamples = o["residual"] == "ddpm" or o["resample"] in ("mean", "fir")
    doubles = o["progressive_output"] != "residual" or o["resample"] != "conv_centred"
    return resamples and doubles and (o["progressive_combine"] == "sum" or o["progressive_input"] == "skip")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_choices(rank):
    """A sixth of all combinations: shape, zero start, a gradient in every channel of every redrawn parameter."""
    size = list(SIZES.values())[rank - 1]
    cases = [c for v in itertools.product(*CHOICES.values()) if fits(c := dict(zip(CHOICES, v, strict=True)))]
    random.Random(0).shuffle(cases)
    for case in cases[rank - 1 :: 6]:
        net = unet(size, c_out=3, **case).double()
        x, label = inputs(3, 2, *size, dtype=F64)
        out = net(x, label)
        assert torch.equal(out, torch.zeros(3, 3, *size)), case
        out = redrawn(net)(x, label)
        assert float(out.detach().abs().flatten(1).amax(1).min()) > 1e-3, case
        out.square().sum().backward()
        for name, p in net.named_parameters():
            moved = p.grad.reshape(len(p), -1).abs().amax(1)
            if name.endswith("qkv.bias"):  # of which the softmax cancels the keys' part
                queries, keys, values = moved.chunk(3)
                assert float(keys.max()) < 1e-12
                moved = torch.cat([queries, values])
            assert float(moved.min()) > 1e-10, (case, name)


def test_options_that_are_numbers():
    """Float multipliers, group counts, heads by their channels, one resolution, no middle attention, [0, 1] data."""
    net = redrawn(unet(multipliers=(1.0, 1.5), rescale_input=True))
    assert [stage.blocks[0].conv1.out_channels for stage in net.down] == [8, 12]
    x, label = inputs(2, 2, 4, 4)
    plain = redrawn(unet(multipliers=(1.0, 1.5)))
    torch.testing.assert_close(net(x, label), plain(2 * x - 1, label))
    heads = lambda net: [m.heads for m in net.modules() if isinstance(m, SelfAttention)]  # noqa: E731
    assert heads(unet(head_channels=4)) == [4, 4, 4]
    assert heads(unet(multipliers=(1, 2, 2), attention=(4, 1), head_channels=8)) == [1, 2, 2, 2, 1]
    assert heads(unet(middle_attention=False, attention=())) == []
    assert heads(unet(attention_up="all", blocks=2)) == [1] * 6
    assert unet((3, 5), multipliers=(1,), attention=(5,))(*inputs(2, 2, 3, 5)).shape == (2, 2, 3, 5)
    groups = {k: m.num_groups for k, m in unet(max_groups=2, attention_groups=8).named_modules() if "norm" in k}
    at_attention = {"down.1.attention.0.norm", "up.0.blocks.0.norm1", "up.0.blocks.1.norm1", "up.0.attention.1.norm"}
    assert {k for k, n in groups.items() if n == 8} == at_attention
    assert {n for k, n in groups.items() if k not in at_attention} == {2}
    dropout = redrawn(unet(dropout=0.5)).train()
    assert all(m.dropout.p == 0.5 for m in dropout.modules() if isinstance(m, ResBlock))
    assert not torch.equal(dropout(x, label), dropout(x, label))


@BOTH
def test_other_sizes(options):
    """A network at another size is the one built for that size; sizes that do not halve are refused."""
    net, (x, label) = redrawn(unet((4, 4), **options)), inputs(2, 2, 6, 8)
    other = unet((6, 8), **(options | dict(attention=(4,))))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x, label), other(x, label))
    with pytest.raises(ValueError, match=r"halves its input 1 times: .* multiple of 2, got \(6, 7\)"):
        net(x[..., :7], label)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((), {}, r"1, 2 or 3 spatial axes, got \(\)"),
        ((2, 2, 2, 2), {}, "1, 2 or 3 spatial axes"),
        ((4,), dict(multipliers=()), "multipliers must have one entry"),
        ((6, 4), dict(multipliers=(1, 1, 1)), r"size \(6, 4\) cannot be halved 2 times"),
        ((4, 8), dict(attention=(4, 3)), r"resolutions of this network are \[8, 4\], not \[3\]"),
        ((8, 4), dict(attention=(8,)), r"attention=\(8,\): the resolutions of this network are \[4, 2\]"),
        *(((4,), {name: "x"}, f"unknown {name} 'x'; use one of {', '.join(CHOICES[name])}") for name in CHOICES),
        ((4,), dict(resample="conv"), "residual='biggan' resamples by 'mean' or 'fir'; a strided convolution needs"),
        ((4,), OTHER | dict(resample="conv_centred"), "progressive_output='residual' needs resample"),
        ((4,), dict(dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        ((4,), dict(drop_cond=1.0), "drop_cond must lie"),
        ((4,), dict(heads=3), r"channels \(16\) must be a multiple of heads, at least 1, got 3"),
        ((4,), dict(multipliers=(1, 1.25), max_groups=4), "18 channels cannot be split into 4 groups"),
        ((4,), dict(head_channels=32), "head_channels=32 is more than the 16 channels"),
        ((4,), dict(attention_groups=5), "channels cannot be split into 5 groups"),
        ((4,), dict(resample="fir", taps=(1,)), "at least two numbers"),
        ((4,), dict(resample="fir", taps=(1, -1)), "sum other than 0"),
    ],
)
def test_bad_arguments(size, options, message):
    """Refused in words when the network is built."""
    with pytest.raises(ValueError, match=message):
        unet(size, **options)


def resampled(x, taps, up, every=True):
    """By SciPy, centred: zeros between and filtered, or every second value of the filtered; or all from one before."""
    out, n = x.numpy(), len(taps)
    for axis in range(2, x.dim()):
        length = out.shape[axis]
        edges = [(0, 0)] * axis + [(n, n)] + [(0, 0)] * (x.dim() - axis - 1)
        whole = upfirdn(np.array(taps) / sum(taps), np.pad(out, edges), up=1 + up, axis=axis)
        down = 2 * np.arange(length // 2) if every else np.arange(-1, length)
        at = np.arange(2 * length) + 2 * n + n // 2 - 1 if up else down + n + n // 2
        out = whole.take(at, axis) * (1 + up)
    return torch.from_numpy(out)


@TAPS
@RANKS
def test_resampling(size, taps):
    """Down and Up against SciPy's filters, adjoint for symmetric taps of even length; and convolutions with them.

    Those without taps have every second value of a plain convolution: the even ones where `centred`, else the odd.
    """
    near = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)  # taps are kept in float32
    rank, fine = len(size), tuple(2 * n for n in size)
    x, y = normal(2, 3, *fine, dtype=F64), normal(2, 3, *size, seed=3, dtype=F64)
    down, up = Down(rank, taps), Up(rank, taps)
    near(down(x), resampled(x, taps, up=False))
    near(up(y), resampled(y, taps, up=True))
    if taps == taps[::-1] and len(taps) % 2 == 0:
        near((down(x) * y).sum(), (x * up(y)).sum() / 2**rank)
    assert not list(down.state_dict())
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    net = redrawn(ConvDown(rank, 3, 2, taps).double())
    near(net(x), conv(resampled(x, taps, up=False, every=False), net.conv.weight, net.conv.bias, stride=2))
    net = redrawn(ConvUp(rank, 3, 2, taps).double())
    near(net(y), conv(resampled(y, taps, up=True), net.conv.weight, net.conv.bias, padding=1))
    for centred in (False, True):
        net = redrawn(ConvDown(rank, 3, 2, centred=centred).double())
        at = (slice(None), slice(None), *(slice(0 if centred else 1, None, 2),) * rank)
        near(net(x), conv(x, net.conv.weight, net.conv.bias, padding=1)[at])


@pytest.mark.parametrize("name", [*SIZES, "other", "MLP", "LeanUNet"])
def test_derivatives(name):
    """Both modes by both interfaces agree, in training too, and with differences; second derivatives of three kinds."""
    size = () if name == "MLP" else SIZES.get(name, (2, 4))
    lean = dict(channels=(8, 8), blocks=(1, 1), embedding=8, positions=2, dropout=0.0)
    net = {"MLP": lambda: MLP(2, width=8), "LeanUNet": lambda: LeanUNet(2, 2, size, **lean)}.get(name)
    net = redrawn((net() if net else unet(size, **(OTHER if name == "other" else FULL))).eval().double(), 0.3)
    u, v = (normal(2, 2, *size, seed=i, dtype=F64) for i in (5, 6))
    x, label = inputs(2, 2, *size, dtype=F64)
    y = x.clone().requires_grad_()
    reverse = torch.autograd.grad((net(y, label) * u).sum(), y)[0]
    _, forward = torch.func.jvp(lambda z: net(z, label), (x,), (v,))
    torch.testing.assert_close((u * forward).sum(), (reverse * v).sum(), rtol=1e-9, atol=1e-9)
    difference = (net(x + 1e-5 * v, label) - net(x - 1e-5 * v, label)) / 2e-5
    torch.testing.assert_close(forward, difference, rtol=1e-5, atol=1e-6)
    for training, grad in itertools.product((False, True), repeat=2):
        net.train(training)
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, v), label)).tangent
        torch.testing.assert_close(tangent, forward, rtol=1e-9, atol=1e-9)
    net.eval()
    loss = lambda z: net(z, label).square().sum()  # noqa: E731
    first = torch.autograd.grad(loss(y), y, create_graph=True)[0]
    twice = torch.autograd.grad((first * v).sum(), y)[0]
    _, mixed = torch.func.jvp(torch.func.grad(loss), (x,), (v,))
    torch.testing.assert_close(mixed, twice, rtol=1e-8, atol=1e-8)
    if name not in ("MLP", "LeanUNet"):  # reverse over forward mode of PyTorch's layer norm is wrong
        other = torch.func.grad(lambda z: torch.func.jvp(loss, (z,), (v,))[1])(x)
        torch.testing.assert_close(other, twice, rtol=1e-8, atol=1e-8)


def outcome(run, net, options, training=True, grad=True, dtype=torch.float32, device="cpu"):
    """The result and the gradients of all parameters."""
    x, label, cond = (u.to(device) for u in (*inputs(3, 2, 4, 4, dtype=dtype), condition(options, 3)))
    net.train(training).zero_grad()
    with torch.set_grad_enabled(grad):
        out = run(x, label, cond)
    if grad:
        out.square().sum().backward()
    return [out.detach(), *(p.grad for p in net.parameters() if grad)]


@BOTH
def test_the_two_ways_to_attend(options):
    """Kernel (training) and written-out attention (evaluation): equal results and gradients of all parameters."""
    net = redrawn(unet(**options).double())
    kernel, written = (outcome(net, net, options, training, dtype=F64) for training in (True, False))
    for a, b in zip(kernel, written, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outcome(net, net, options, False, False, dtype=F64)[0], kernel[0])


def test_vmap():
    """Over examples, over tangents, and gradients of each example by the parameters."""
    net, (x, label) = redrawn(unet().double()), inputs(3, 2, 4, 4, dtype=F64)
    one = lambda y, t: net(y[None], t[None])[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(one)(x, label), net(x, label))
    v = normal(3, 2, 4, 4, seed=6, dtype=F64)
    expected = torch.func.jvp(lambda y: net(y, label), (x,), (v,))[1]
    push = lambda y, t, w: torch.func.jvp(lambda z: one(z, t), (y,), (w,))[1]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(push)(x, label, v), expected)
    torch.testing.assert_close(torch.func.jvp(lambda y: torch.func.vmap(one)(y, label), (x,), (v,))[1], expected)
    weights = dict(net.named_parameters())
    loss = lambda w, y, t: torch.func.functional_call(net, w, (y[None], t[None])).square().sum()  # noqa: E731
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, label)
    net(x, label).square().sum().backward()
    for name, p in weights.items():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-8, atol=1e-8)


def test_vmap_inside_of_forward_mode():
    """Where attention asks whether there is a tangent, here in training."""
    net, (x, label) = redrawn(unet()).train(), inputs(3, 2, 4, 4)
    one = torch.func.vmap(lambda y, t: net(y[None], t[None])[0])
    torch.func.jvp(lambda y: one(y, label), (x,), (x,))


@BOTH
def test_config_rebuilds_the_network(options):
    """By way of JSON; the state dict has the parameters and the noise frequencies, and nothing else."""
    net, (x, label) = redrawn(unet(taps=[1, 2, 1], dropout=0.1, drop_cond=0.1, **options)), inputs(3, 2, 4, 4)
    again = UNet(**json.loads(json.dumps(net.config))).eval()
    assert again.config == net.config
    again.load_state_dict(net.state_dict())
    cond = condition(options, 3)
    assert torch.equal(again(x, label, cond), net(x, label, cond))
    assert set(net.state_dict()) == {k for k, _ in net.named_parameters()} | {"embed.frequencies"}


@BOTH
def test_small_batches(options):
    """No example and one, forward and backward."""
    for batch, training in itertools.product((0, 1), (False, True)):
        x, label = inputs(batch, 2, 4, 4)
        out = redrawn(unet(**options)).train(training)(x.requires_grad_(), label, condition(options, batch))
        assert out.shape == x.shape
        out.sum().backward()


@BOTH
def test_dtypes_and_layouts(options, device):
    """Autocast, bfloat16, float64 and channels_last give what float32 gives; the latter keeps its layout."""
    net, (x, label) = redrawn(unet(**options), 0.1).to(device), (u.to(device) for u in inputs(3, 2, 4, 4))
    expected = net(x, label).detach()
    near = dict(atol=0.05 * float(expected.abs().max()), rtol=0)
    for training in (False, True):
        net.train(training).zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = net(x, label)
        out.float().square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
        torch.testing.assert_close(out.detach().float(), expected, **near)
    net.eval().to(memory_format=torch.channels_last)
    out = net(x.to(memory_format=torch.channels_last), label)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(net.double()(x.double(), label).detach(), expected.double(), rtol=1e-3, atol=1e-5)
    out = net.to(torch.bfloat16)(x.to(torch.bfloat16), label)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.detach().float(), expected, **near)


@pytest.mark.parametrize(("options", "training"), [(FULL, False), (PLAIN, True)], ids=["eval", "training"])
def test_compiled_networks_agree(options, training, device):
    """One graph: the result without gradients, and in training the gradients too. Whole kernels on the GPU only."""
    net = redrawn(unet(**options)).to(device)
    compiled = torch.compile(net, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    found = [outcome(run, net, options, training, training, device=device) for run in (compiled, net)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(blocks=0), "blocks must be at least 1"),
        (dict(width=0), "width must be at least 1"),
        (dict(max_groups=0), "max_groups must be at least 1"),
        (dict(frequencies=0), "frequencies must be at least 1"),
        (dict(multipliers=(1, 0.01)), "give a channel at least"),
    ],
    ids=str,
)
def test_counts_below_one(options, error):
    """Options that count something are at least 1."""
    with pytest.raises(ValueError, match=error):
        UNet(3, 3, (4, 4), **(dict(width=8, multipliers=(1, 2), blocks=1, attention=()) | options))


def test_inputs_of_another_shape():
    """x of another rank or with other channels, labels of another length, a size that is no tuple."""
    net = UNet(3, 3, (4, 4), width=8, multipliers=(1, 2), blocks=1, attention=())
    for x, label in (((3, 4, 4), (3,)), ((2, 1, 4, 4), (2,)), ((2, 3, 4, 4), (1,)), ((2, 3, 4, 4), (3,))):
        with pytest.raises(ValueError, match=r"x of shape \(B, 3, \*, \*\)"):
            net(torch.zeros(x), torch.zeros(label))
    with pytest.raises(TypeError, match="size must be a tuple"):
        UNet(3, 3, 4)
