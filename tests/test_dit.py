"""The diffusion transformer: shapes, positions, conditions, derivatives, published sizes, and diffusers' networks."""

import json

import pytest
import torch

from scoresde.interop.diffusers.dit import blocks_differ, dit_from_config, dit_weights
from scoresde.interop.files import Weights
from scoresde.nets import dit as module
from scoresde.nets.dit import DiT

SMALL = dict(width=24, depth=2, heads=2, frequencies=8)
SIZES = pytest.mark.parametrize(("size", "patch"), [((8,), 2), ((4, 6), 2), ((4, 2, 6), (2, 1, 3))], ids=str)
POSITIONS = pytest.mark.parametrize("positions", module.POSITIONS)


def dit(size=(4, 4), c_in=2, c_out=2, seed=0, **options):
    torch.manual_seed(seed)
    return DiT(c_in, c_out, size, **(SMALL | options)).eval()


def redrawn(net, seed=1, scale=0.2):
    """The network with all parameters drawn anew, so that gates and the output layer are not zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return net


def inputs(shape, dtype=torch.float32, seed=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype), (1000 * torch.rand(shape[0], generator=g)).to(dtype)


@POSITIONS
@SIZES
def test_shapes_and_zero_start(size, patch, positions):
    """(B, in, *size) -> (B, out, *size), exactly zero at the start, and not once the weights have moved."""
    net = dit(size, c_out=3, patch=patch, positions=positions)
    x, label = inputs((5, 2, *size))
    assert torch.equal(net(x, label), torch.zeros(5, 3, *size))
    out = redrawn(net)(x, label)
    assert float(out.detach().abs().amin(0).max()) > 1e-3
    torch.testing.assert_close(net(x[2:3], label[2:3]), out[2:3], atol=1e-5, rtol=1e-5)  # examples do not mix


@SIZES
def test_patches_stay_in_place(size, patch):
    """Without the blocks, whose gates are closed, a pixel of the output sees its own patch of the input, no other."""
    net = dit(size, patch=patch, positions="rotary")
    net.enter, net.leave = redrawn(net.enter), redrawn(net.leave)
    x, label = inputs((1, 2, *size))
    jacobian = torch.func.jacrev(lambda y: net(y[None, None].expand_as(x), label)[0, 0])(x[0, 0])
    places = torch.cartesian_prod(*(torch.arange(n) // p for n, p in zip(size, net.patch, strict=True)))
    same = (places.reshape(-1, 1, len(size)) == places.reshape(-1, len(size))).all(-1)
    assert torch.equal(jacobian.reshape(same.shape).abs() > 1e-6, same)


@pytest.mark.parametrize("positions", [*module.POSITIONS, "none"])
def test_positions_matter(positions):
    """Exchanging two patches exchanges the outputs where a network has no positions, and not otherwise."""
    net = redrawn(dit((8,), positions="rotary" if positions == "rotary" else "sincos"))
    if positions == "none":
        net.positions.zero_()
    x, label = inputs((2, 2, 8))
    order = [0, 1, 6, 7, 4, 5, 2, 3]
    difference = (net(x[..., order], label) - net(x, label)[..., order]).detach().abs().max()
    assert bool(difference > 1e-3) == (positions != "none")


@SIZES
def test_sincos_table(size, patch):
    """The first width / rank channels are of the last axis: sine and cosine of the coordinate itself come first."""
    net = dit(size, patch=patch)
    grid = [n // p for n, p in zip(size, net.patch, strict=True)]
    table, pairs = net.positions.reshape(*grid, -1), 24 // (2 * len(grid))
    for i, n in enumerate(reversed(grid)):
        along = table[(0,) * (len(grid) - 1 - i) + (slice(None),) + (0,) * i]
        torch.testing.assert_close(along[:, 2 * pairs * i], torch.arange(n).sin())
        torch.testing.assert_close(along[:, 2 * pairs * i + pairs], torch.arange(n).cos())
    assert torch.cdist(net.positions, net.positions).add(torch.eye(len(net.positions))).min() > 0.1


@pytest.mark.parametrize("grid", [(7,), (4, 5), (3, 4, 2)], ids=str)
def test_rotary_logits_depend_on_differences_of_positions(grid, monkeypatch):
    """For a constant image, whose patches are equal, attention logits are equal where offsets are, and only there."""
    seen = []
    monkeypatch.setattr(module, "attend", lambda q, k, v, training: seen.append((q, k, v)) or v)
    net = redrawn(
        dit(grid, patch=1, width=40, positions="rotary")
    ).double()  # 10 pairs per head: in 3D one is left over
    net(*(torch.ones(shape, dtype=torch.float64) for shape in ((1, 2, *grid), (1,))))
    q, k, v = (u[0, 0] for u in seen[0])
    place, logits = torch.cartesian_prod(*(torch.arange(m) for m in grid)).reshape(len(q), -1), q @ k.T
    offsets = (place[:, None] - place).flatten(0, 1)
    same = (offsets[:, None] == offsets).all(-1)
    assert torch.equal((logits.reshape(-1, 1) - logits.reshape(-1)).abs() < 1e-9, same)
    torch.testing.assert_close(v, v[:1].expand_as(v))


def test_sizes_of_inputs():
    """Rotary networks work at all sizes that the patch divides; the others at their own. Messages name the sizes."""
    net = redrawn(dit((4, 4), positions="rotary"))
    x, label = inputs((2, 2, 6, 10))
    assert net(x, label).shape == x.shape
    with pytest.raises(ValueError, match="multiple of its patch"):
        net(x[..., :9], label)
    with pytest.raises(ValueError, match=r"of size \(4, 4\), got \(6, 10\); only a network with positions="):
        dit()(x, label)
    with pytest.raises(ValueError, match=r"shape \(B, 2, \*, \*\)"):
        dit()(x[..., 0], label)


@pytest.mark.parametrize("shared", [True, False])
def test_conditions(shared):
    """Classes and features change the output; none is the last class and zeros; wrong shapes are named."""
    net = redrawn(dit(classes=3, cond_dim=4, shared_embedding=shared))
    x, label = inputs((3, 2, 4, 4))
    classes, features, without = torch.arange(3), torch.ones(3, 4), net(x, label)
    torch.testing.assert_close(net(x, label, dict(classes=0 * classes + 3, features=0 * features)), without)
    for cond in (dict(classes=classes), dict(features=features)):
        assert float((net(x, label, cond) - without).detach().abs().flatten(1).max(1).values.min()) > 1e-3
    with pytest.raises(ValueError, match=r"cond must have shape \(3, 4\)"):
        net(x, label, dict(features=features[:, :2]))
    with pytest.raises(ValueError, match="without conditions"):
        dit()(x, label, features)


@pytest.mark.parametrize("shared", [True, False])
def test_dropped_conditions(shared):
    """In training a share of the examples is as without condition, in all blocks at once; in evaluation none is."""
    net = redrawn(dit(depth=3, classes=2, drop_cond=0.3, shared_embedding=shared))
    x, label, cond = torch.ones(400, 2, 4, 4), torch.full((400,), 100.0), torch.ones(400, dtype=torch.long)
    kept, null = net(x, label, cond), net(x, label)
    out = net.train()(x, label, cond)
    is_kept, is_null = (torch.isclose(out, v, atol=1e-4, rtol=1e-4).flatten(1).all(1) for v in (kept, null))
    assert bool((is_kept ^ is_null).all())
    assert 80 < int(is_null.sum()) < 160


@POSITIONS
def test_derivatives(positions):
    """Forward and reverse mode agree, and second derivatives by both; differences agree with all."""
    net = redrawn(dit(positions=positions)).double()
    x, label = inputs((2, 2, 4, 4), torch.float64)
    u, v = (torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype) for i in (4, 5))

    def difference(f):
        return ((f(x + 1e-5 * v) - f(x - 1e-5 * v)) / 2e-5).detach()

    _, forward = torch.func.jvp(lambda y: net(y, label), (x,), (v,))
    _, pullback = torch.func.vjp(lambda y: net(y, label), x)
    torch.testing.assert_close((u * forward).sum(), (pullback(u)[0] * v).sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forward, difference(lambda y: net(y, label)), rtol=1e-5, atol=1e-6)
    gradient = torch.func.grad(lambda y: net(y, label).square().sum())
    _, mixed = torch.func.jvp(gradient, (x,), (v,))
    torch.testing.assert_close(mixed, difference(gradient), rtol=1e-4, atol=1e-5)
    y = x.clone().requires_grad_()
    once = torch.autograd.grad(net(y, label).square().sum(), y, create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad((once * v).sum(), y)[0], mixed, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_compiled_networks_agree():
    """torch.compile in one graph, forward and backward."""
    net = redrawn(dit(positions="rotary", classes=2))
    x, label = inputs((2, 2, 4, 4))
    results = []
    for call in (torch.compile(net, fullgraph=True), net):
        y = x.clone().requires_grad_()
        out = call(y, label, torch.tensor([0, 1]))
        results.append((out, *torch.autograd.grad(out.square().sum(), y)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@POSITIONS
def test_other_dtypes(positions, device):
    """Under bfloat16 autocast, trained or not, and as a bfloat16 network: near float32."""
    net = redrawn(dit(positions=positions), scale=0.1).to(device)
    x, label = (u.to(device) for u in inputs((3, 2, 4, 4)))
    label = label / 1000  # angles that bfloat16 can tell apart
    expected = net(x, label).detach()
    for training in (False, True):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = net.train(training)(x, label)
        out.float().square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
        torch.testing.assert_close(out.detach().float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)
    out = net.to(torch.bfloat16).eval()(x.to(torch.bfloat16), label)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.detach().float(), expected, atol=0.1 * float(expected.abs().max()), rtol=0)


def test_config_rebuilds_the_network():
    """By way of JSON, with all options away from their defaults."""
    options = dict(patch=[1, 2], positions="rotary", embedding="fourier", fourier_scale=2.0, mlp_ratio=2.0, dropout=0.1)
    net = redrawn(dit((2, 6), **options, classes=2, cond_dim=1, drop_cond=0.1, shared_embedding=False, mlp_eps=1e-5))
    again = DiT(**json.loads(json.dumps(net.config))).eval()
    assert again.config == net.config
    again.load_state_dict(net.state_dict())
    given = inputs((3, 2, 2, 6))
    assert torch.equal(again(*given), net(*given))
    assert not torch.equal(net.train()(*given), net(*given))  # dropout
    assert "positions" not in dit().state_dict()


@pytest.mark.parametrize(
    ("width", "depth", "heads", "published"),
    [(384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)],
)
def test_published_sizes(width, depth, heads, published):
    """DiT-S, B, L and XL/2, in millions with frozen positions: 32 x 32 x 4 latents, 1000 classes, learned variance."""
    with torch.device("meta"):
        net = DiT(4, 8, (32, 32), width=width, depth=depth, heads=heads, classes=1000)
    count = sum(p.numel() for p in net.parameters()) + net.positions.numel()
    assert abs(count / 1e6 - published) < 0.52  # 130.5 is published as 130
    assert published != 675 or count == 675_129_632


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((2, 2, 2, 2), {}, "1, 2 or 3 spatial axes"),
        ((5, 4), {}, "does not divide size"),
        ((4, 4), dict(patch=(2, 2, 2)), "one per axis"),
        ((4, 4), dict(heads=5), r"\(24\) must be a multiple of heads \(5\)"),
        ((4, 4), dict(depth=0), "depth must be at least 1, got 0"),
        ((4, 4), dict(width=18), "width that 4 divides"),
        ((4, 4), dict(width=6, positions="rotary"), "even number of channels per head"),
        ((4, 4), dict(positions="learned"), "unknown positions 'learned'; use one of sincos, rotary"),
        ((4, 4), dict(drop_cond=1.0), "drop_cond must lie"),
    ],
)
def test_bad_arguments(size, options, message):
    """Said in words when the network is built."""
    with pytest.raises(ValueError, match=message):
        dit(size, **options)


def theirs(equal, **options):
    """diffusers' network with all parameters drawn anew, and with equal or different embeddings in its blocks."""
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(num_attention_heads=2, attention_head_dim=12, in_channels=3, num_layers=3, sample_size=8)
    options = sizes | dict(num_embeds_ada_norm=5) | options
    peer = redrawn(diffusers.DiTTransformer2DModel(**options).eval(), scale=0.15)
    for block in peer.transformer_blocks if equal else ():
        block.norm1.emb.load_state_dict(peer.transformer_blocks[0].norm1.emb.state_dict())
    return peer


@pytest.mark.parametrize("options", [{}, dict(out_channels=6, norm_eps=0.01)], ids=["noise", "variance"])
@pytest.mark.parametrize("equal", [True, False])
def test_networks_of_diffusers(equal, options):
    """Equal outputs, noise only where theirs has a variance too, with each class and with none."""
    peer = theirs(equal, **options)
    weights = Weights(peer.state_dict(), "peer")
    assert blocks_differ(weights) != equal
    net = dit_from_config(json.loads(peer.to_json_string()), blocks_differ(weights)).eval()
    weights.fill(net, dit_weights(net, weights))
    assert (net.config["shared_embedding"], net.config["classes"]) == (equal, 5)
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t, classes = torch.tensor([0, 1, 37, 400, 998, 999]), torch.arange(6)  # 5 is no class
    with torch.no_grad():
        expected = peer(x, t, classes).sample[:, :3]
        error = (net(x, t.float(), classes) - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        torch.testing.assert_close(net(x[5:], t[5:].float()), net(x, t.float(), classes)[5:], rtol=1e-4, atol=1e-5)
    assert float(error.max()) < 1e-5, error


def test_weights_of_diffusers_that_do_not_fit():
    """Different embeddings in a network that shares one; and any missing tensor is named."""
    peer = theirs(equal=False)
    with pytest.raises(ValueError, match="different noise embeddings"):
        dit_weights(dit_from_config(dict(peer.config), own_embeddings=False), Weights(peer.state_dict(), "peer"))
    net = dit_from_config(dict(peer.config), own_embeddings=True)
    for name in peer.state_dict():
        weights = Weights({k: v for k, v in peer.state_dict().items() if k != name}, "peer")
        with pytest.raises(ValueError, match=f"missing: {name}"):
            weights.fill(net, dit_weights(net, weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(norm_type="ada_norm"), "norm_type='ada_norm' is not supported; only 'ada_norm_zero' is"),
        (dict(attention_bias=False), "attention_bias=False"),
        (dict(num_embeds_ada_norm=None), "whole number for num_embeds_ada_norm, got None"),
        (dict(out_channels=5), "out_channels=4, or 8 with a learned variance; got 5"),
        (dict(qk_norm="rms_norm", patch_size=4), "not known here: qk_norm"),
    ],
)
def test_options_of_diffusers_that_are_not_supported(options, message):
    """Named, with what is; older files have more options, which are read where they change nothing."""
    older = dict(_class_name="Transformer2DModel", cross_attention_dim=None, only_cross_attention=False, patch_size=2)
    dit_from_config(older | dict(num_layers=1, attention_head_dim=4, norm_num_groups=32), True)
    with pytest.raises(ValueError, match=message):
        dit_from_config(older | options, True)
