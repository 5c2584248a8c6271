"""Options of networks: wrong kinds and absurd sizes refused at once in one line; every network on the meta device."""

import json
import time

import numpy as np
import pytest
import torch

from scoresde.nets import MLP, NETS, NETWORK_PRESETS, DiT, LeanUNet, RefineNet, UNet
from scoresde.nets.options import LIMITS

# the least arguments of each network, and small ones
NEEDED = {
    "UNet": dict(in_channels=2, out_channels=2, size=(4, 4)),
    "LeanUNet": dict(in_channels=2, out_channels=2, size=(4, 4)),
    "DiT": dict(in_channels=2, out_channels=2, size=(4, 4)),
    "MLP": dict(dim=2),
    "RefineNet": dict(in_channels=2, size=(16, 16)),
}
SMALL = {
    "UNet": dict(width=8, multipliers=(1, 2), blocks=1, attention=(2,)),
    "LeanUNet": dict(channels=(8, 8), blocks=(1, 1)),
    "DiT": dict(patch=2, width=8, depth=1, heads=2),
    "MLP": dict(width=8, depth=1),
    "RefineNet": dict(width=4),
}
EVERY = {
    "UNet": dict(
        resample="fir", progressive_input="residual", progressive_output="skip", embedding="fourier", pad=True
    ),
    "LeanUNet": dict(pad=True),
    "DiT": dict(shared_embedding=False),
    "MLP": dict(features="fourier"),
    "RefineNet": dict(steps=3),
}
CONDITIONS = dict(classes=3, cond_dim=2, numbers=2, tokens=3, pooled=4)
EACH = pytest.mark.parametrize("name", NETS)


def options_of(name, kind):
    """The options whose annotation begins with `kind`."""
    found = NETS[name].__init__.__annotations__
    return sorted(k for k, annotation in found.items() if annotation.split(" | ")[0] == kind)


def build(name, **options):
    return NETS[name](**(NEEDED[name] | SMALL[name] | options))


@EACH
def test_booleans_floats_and_words_are_no_integers(name):
    """Every option that counts: refused in a line that names it, True too; and numbers are no words or truth values."""
    for option in options_of(name, "int"):
        for bad in (True, 2.5, "3", [1.5], torch.tensor(2), 1j):
            with pytest.raises(TypeError, match=rf"^{option} must be "):
                build(name, **{option: bad})
    for option in options_of(name, "bool"):
        for bad in (1, "yes", None):
            with pytest.raises(TypeError, match=rf"^{option} must be True or False"):
                build(name, **{option: bad})
    for option in options_of(name, "str"):
        for bad in (1, None, ("a",)):
            with pytest.raises(TypeError, match=rf"^{option} must be a string"):
                build(name, **{option: bad})
    for option in options_of(name, "float"):
        for bad in (True, "0.5", (0.5,)):
            with pytest.raises(TypeError, match=rf"^{option} must be a number"):
                build(name, **{option: bad})
    for option in (*options_of(name, "Sequence[int]"), *options_of(name, "Sequence[float]")):
        for bad in (3, "44", None, (True,), ("a",), np.ones(2)):
            with pytest.raises(TypeError, match=rf"^{option} must be a tuple"):
                build(name, **{option: bad})


@EACH
def test_numbers_out_of_range(name):
    """Zero or less where something is counted, more than any network has, NaN and infinity: one line with the option's name."""
    for option in options_of(name, "int"):
        low, high = LIMITS[option]
        for bad in (low - 1, -(10**9), high + 1, 10**30):
            with pytest.raises(ValueError, match=rf"^{option} must be at (least|most) "):
                build(name, **{option: bad})
    for option in (*options_of(name, "float"), *options_of(name, "Sequence[float]")):
        many = option in options_of(name, "Sequence[float]")
        for bad in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(ValueError, match=option):
                build(name, **{option: (bad, 1.0) if many else bad})
    for option in options_of(name, "Sequence[int]"):
        for bad in ((-1, 1), (4, 10**9), (1,) * 65):
            with pytest.raises(ValueError, match=option):
                build(name, **{option: bad})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("UNet", dict(blocks=0), "blocks must be at least 1, got 0"),
        ("UNet", dict(blocks=-1), "blocks must be at least 1, got -1"),
        ("UNet", dict(blocks=10**6), "blocks must be at most 256, got 1000000"),
        ("UNet", dict(width=20_000), "width must be at most 16384, got 20000"),
        ("UNet", dict(width=10_000), "10000 must each give a channel at least, and at most 16384"),
        ("UNet", dict(multipliers=(1,) * 4, blocks=256, size=(8, 8)), "at most 512 blocks on its way down"),
        ("UNet", dict(multipliers=()), "multipliers must have one entry per resolution, got none"),
        ("UNet", dict(multipliers=(1, -1)), "multipliers must be more than 0"),
        ("UNet", dict(attention=(3,)), r"the resolutions of this network are \[4, 2\], not \[3\]"),
        ("UNet", dict(heads=3), "must be a multiple of heads, at least 1, got 3"),
        ("UNet", dict(head_channels=5), "head_channels=5 does not divide the 16 channels that attend"),
        ("UNet", dict(dropout=float("nan")), r"dropout must lie in \[0, 1\), got nan"),
        ("UNet", dict(eps=0.0), "eps must be more than 0"),
        ("UNet", dict(fourier_scale=-1.0), "fourier_scale must be more than 0"),
        ("LeanUNet", dict(blocks=(300, 300)), "blocks must be at most 512 together"),
        ("LeanUNet", dict(blocks=(-1, 1)), r"blocks must be at least 0, got \(-1, 1\)"),
        ("LeanUNet", dict(channels=(6, 6)), r"channels \(6\) must be a multiple of heads \(4\)"),
        ("DiT", dict(depth=10**6), "depth must be at most 256"),
        ("DiT", dict(heads=0), "heads must be at least 1"),
        ("DiT", dict(size=(2**15, 2**15)), "positions of 268435456 patches are too many to keep"),
        ("DiT", dict(mlp_ratio=float("nan")), "mlp_ratio must be finite"),
        ("DiT", dict(drop_cond=float("nan")), r"drop_cond must be finite|drop_cond must lie in \[0, 1\), got nan"),
        ("DiT", dict(drop_cond="often"), "drop_cond must be a number or a dict of numbers"),
        ("MLP", dict(dropout=float("nan")), r"dropout must lie in \[0, 1\), got nan"),
        ("MLP", dict(width=0), "width must be at least 1, got 0"),
        ("MLP", dict(depth=10**6), "depth must be at most 256"),
        ("RefineNet", dict(width=16384), "a stage has at most 16384 channels"),
        ("RefineNet", dict(dilations=(1, 1, 2, 0)), "dilations must be at least 1"),
    ],
)
def test_one_clear_line(name, options, message):
    """What is wrong, at once: nothing is built before the options have been looked at."""
    start = time.process_time()
    with pytest.raises((TypeError, ValueError), match=message):
        build(name, **options)
    assert time.process_time() - start < 1.0


@EACH
def test_inputs_of_another_shape(name):
    """x of another rank, with other channels, or labels of another length: said with both shapes."""
    net = build(name)
    x, label = torch.zeros(2, *([2] if name == "MLP" else (2, *NEEDED[name]["size"]))), torch.zeros(2)
    for bad, its_label in ((x[0], label), (x[:, :1], label), (x[..., None], label), (x, label[:1])):
        with pytest.raises(ValueError, match=r"takes x of shape \(B, 2"):
            net(bad, its_label)


def test_a_network_of_one_size_says_so():
    """Where position maps or attention are those of one size."""
    with pytest.raises(ValueError, match=r"of size \(4, 4\), got \(8, 8\)"):
        build("LeanUNet")(torch.zeros(1, 2, 8, 8), torch.zeros(1))
    plain = build("LeanUNet", positions=0, attention=False)
    assert plain(torch.zeros(1, 2, 8, 8), torch.zeros(1)).shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"multiple of 2, got \(7, 8\)"):
        plain(torch.zeros(1, 2, 7, 8), torch.zeros(1))


@EACH
def test_numbers_of_numpy_become_pythons(name):
    """So that a configuration goes through JSON, and lists count as tuples."""
    options = NEEDED[name] | SMALL[name]
    given = {
        k: [np.int64(i) for i in v] if isinstance(v, tuple) else np.int32(v) if isinstance(v, int) else v
        for k, v in options.items()
    }
    if name != "RefineNet":
        given["dropout"] = np.float64(0.25)
    net = NETS[name](**given)
    again = NETS[name](**json.loads(json.dumps(net.config)))
    assert again.config == net.config
    assert all(net.config[k] == v for k, v in options.items())
    kinds = {type(v) for v in net.config.values()} | {
        type(i) for v in net.config.values() if isinstance(v, tuple) for i in v
    }
    assert kinds <= {int, float, bool, str, tuple, type(None)}


def shapes(net):
    """Name, shape and type of every parameter and buffer, kept or not."""
    return {k: (tuple(v.shape), v.dtype) for k, v in (*net.named_parameters(), *net.named_buffers())}


@pytest.mark.parametrize("options", [SMALL, EVERY], ids=["small", "every"])
@EACH
def test_meta_device(name, options):
    """The same tensors by name, shape and type, and no memory taken, so that a file can be compared before."""
    extra = CONDITIONS if options is EVERY and name != "RefineNet" else {}
    given = NEEDED[name] | SMALL[name] | options[name] | extra
    if extra and name != "MLP":
        given |= dict(spatial=1)
    with torch.device("meta"):
        meta = NETS[name](**given)
    assert all(v.is_meta for v in (*meta.parameters(), *meta.buffers()))
    real = NETS[name](**given)
    assert shapes(meta) == shapes(real)
    assert list(meta.state_dict()) == list(real.state_dict())
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in real.parameters()) > 100


def test_published_networks_are_within_the_limits():
    """All of them, on the meta device."""
    for name, (kind, options) in NETWORK_PRESETS.items():
        with torch.device("meta"):
            assert kind(**options).config.items() >= options.items(), name


def test_the_largest_network_is_counted_quickly():
    """At the limits of depth a network on the meta device takes seconds and no memory."""
    start = time.process_time()
    with torch.device("meta"):
        DiT(2, 2, (4, 4), width=2**14, heads=64, depth=256)
        MLP(2, width=2**14, depth=256)
        UNet(2, 2, (8, 8), width=16, multipliers=(1, 1), blocks=256, attention=())
        LeanUNet(2, 2, (4, 4), channels=(16, 16), blocks=(256, 256))
        RefineNet(2, (64, 64), width=256, multipliers=(1,) * 30, dilations=(1, *(2,) * 29))
    assert time.process_time() - start < 30.0
