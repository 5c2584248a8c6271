"""What networks are told: features of the noise label, classes, continuous conditions, and dropping them in training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from scoresde.nets import MLP, LeanUNet, UNet
from scoresde.nets.conditioning import ConditionalEmbedding, Conditions
from scoresde.nets.embedding import KINDS, NoiseEmbedding

SMALL = dict(frequencies=6)
CONDITIONS = {"classes": dict(classes=4), "features": dict(cond_dim=3), "both": dict(classes=4, cond_dim=3)}
JOIN = pytest.mark.parametrize("join", ["hidden", "output"])
EACH = pytest.mark.parametrize("which", CONDITIONS)
KIND = pytest.mark.parametrize("kind", KINDS)


class WithCondition(ConditionalEmbedding):
    """The embedding together with what a network does first: reading the condition."""

    def __init__(self, width, cond_dim=0, *, classes=0, drop_cond=0.0, null_class=True, **options):
        conditions = Conditions(classes, cond_dim, drop=drop_cond, null_class=null_class)
        super().__init__(width, conditions, **options)
        self.conditions = conditions

    def forward(self, label, cond=None):
        return super().forward(label, self.conditions.read(cond, label, self.training))


def embed(width=8, seed=0, **options):
    """An embedding with all parameters drawn anew, so that every part shows in the result."""
    torch.manual_seed(seed)
    module = WithCondition(width, **(SMALL | options)).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4)
    return module


def features(module, label):
    """What the first layer is given."""
    seen = []
    handle = module.first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    module(label)
    handle.remove()
    return seen[0]


def normal(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def condition(which, batch, soft=False):
    """A condition of each kind: classes 0, 1, 2, 3, 0 ... or weights of them, and random features."""
    classes = torch.arange(batch) % 4
    classes = torch.softmax(normal(batch, 4, seed=8), 1) if soft else classes
    parts = dict(classes=classes, features=normal(batch, 3, seed=9))
    return parts if which == "both" else parts[which]


def written_out(module, label, added=0.0):
    """The definition: features, linear, SiLU, linear, SiLU, with what the condition adds at its place."""
    first, second = module.first, module.second
    h = features(module, label) @ first.weight.T + first.bias
    h = h + added if module.join == "hidden" else h
    h = F.silu(h) @ second.weight.T + second.bias
    return F.silu(h + added if module.join == "output" else h)


@pytest.mark.parametrize("count", [2, 6, 16])
@KIND
def test_features(kind, count):
    """Sines, then cosines, of the label times the frequencies of the table, against double precision."""
    module = embed(kind=kind, frequencies=count, scale=3.0)
    label = torch.tensor([0.0, -0.7, 1.3, 2.0]) * (100.0 if kind == "positional" else 1.0)
    expected = {
        "sinusoidal": [math.exp(-1.3 + 4.5 * j / (count - 1)) for j in range(count)],
        "positional": [10000.0 ** (-j / (count - 1)) for j in range(count)],
        "fourier": [2 * math.pi * float(f) for f in module.frequencies],
    }[kind]
    angle = label.double()[:, None] * torch.tensor(expected, dtype=torch.float64)
    expected = torch.cat([angle.sin(), angle.cos()], 1).float()
    torch.testing.assert_close(features(module, label), expected, atol=5e-5, rtol=0)


def test_fourier_frequencies_are_drawn_with_the_scale():
    """Normal with standard deviation `scale`, another draw for another seed, and kept in the state dict."""
    torch.manual_seed(0)
    a, b = (NoiseEmbedding(2, frequencies=4000, kind="fourier", scale=5.0) for _ in range(2))
    assert abs(float(a.frequencies.std()) - 5.0) < 0.25
    assert abs(float(a.frequencies.mean())) < 0.3
    assert not torch.equal(a.frequencies, b.frequencies)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.frequencies, b.frequencies)
    assert "frequencies" not in dict(a.named_parameters())


def test_one_frequency():
    """The positional kind has the frequency 1 then, not a division by zero."""
    assert NoiseEmbedding(2, frequencies=1, kind="positional").frequencies.tolist() == [1.0]


@JOIN
@KIND
def test_definition_without_condition(kind, join):
    """Two linear layers with SiLU after each; `join` makes no difference where there is nothing to join."""
    module, label = embed(kind=kind, join=join), normal(5)
    torch.testing.assert_close(module(label), written_out(module, label), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "weights"])
@JOIN
@EACH
def test_definition_with_condition(which, join, soft):
    """A row of the class table or a mixture of rows, and a linear map of the features, added before a SiLU."""
    module, label = embed(join=join, **CONDITIONS[which]), normal(5)
    cond = condition(which, 5, soft)
    added = torch.zeros(5, 8)
    if which != "features":
        classes = cond["classes"] if which == "both" else cond
        rows = classes if soft else F.one_hot(classes, 4).float()
        added = added + rows @ module.classes.weight[:4]
    if which != "classes":
        added = added + (cond["features"] if which == "both" else cond) @ module.cond.weight.T
    out = module(label, cond)
    torch.testing.assert_close(out, written_out(module, label, added), atol=1e-6, rtol=1e-5)
    if which != "both":  # a dict says the same
        assert torch.equal(module(label, {which: cond}), out)


@JOIN
@EACH
def test_no_condition(which, join):
    """None, an empty dict and the null label with zeros are the same; its row is a parameter like the others."""
    module, label = embed(join=join, **CONDITIONS[which]), normal(5)
    none = dict(classes=torch.full((5,), 4), features=torch.zeros(5, 3))
    expected = module(label, none if which == "both" else none[which])
    for cond in (None, {}, dict(classes=None, features=None)):
        torch.testing.assert_close(module(label, cond), expected)
    if which != "features":
        added = module.classes.weight[4].expand(5, -1)
        torch.testing.assert_close(module(label), written_out(module, label, added), atol=1e-6, rtol=1e-5)
        module(label).sum().backward()
        moved = module.classes.weight.grad.abs().amax(1)
        assert float(moved[4]) > 1e-3
        assert float(moved[:4].max()) == 0.0
    if which == "both":  # each part may be missing alone
        for key in none:
            part = {key: condition("both", 5)[key]}
            torch.testing.assert_close(module(label, part), module(label, none | part))


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "weights"])
@JOIN
@EACH
def test_dropping(which, join, soft):
    """In training about the given share of the examples is as without condition, all parts at once; in eval none."""
    module = embed(join=join, drop_cond=0.3, **CONDITIONS[which])
    label, cond = normal(1).expand(4000), condition(which, 4000, soft)
    kept, none = module(label, cond), module(label)
    torch.manual_seed(0)
    assert torch.equal(module(label, cond), kept)
    module.train()
    out = module(label, cond)
    is_kept, is_none = ((out - v).abs().amax(1) < 1e-5 for v in (kept, none))
    assert bool((is_kept ^ is_none).all())
    assert abs(float(is_none.float().mean()) - 0.3) < 0.03  # four standard deviations
    assert not torch.equal(module(label, cond), out)  # drawn anew in every pass
    torch.testing.assert_close(module(label), none)
    module.conditions.drop = 0.0
    torch.testing.assert_close(module(label, cond), kept)


def test_dropped_examples_teach_the_null_row_only():
    """Its gradient, and that of the features' map, comes from the examples that it stands for."""
    module = embed(drop_cond=0.5, classes=2, cond_dim=3).train()
    torch.manual_seed(0)
    dropped = torch.rand(6) < 0.5
    assert 0 < int(dropped.sum()) < 6
    cond = dict(classes=torch.ones(6, dtype=torch.long), features=normal(6, 3))
    for rows, has in [(dropped, (False, False, True)), (~dropped, (False, True, False))]:
        torch.manual_seed(0)
        module.zero_grad()
        module(normal(6), cond)[rows].sum().backward()
        assert tuple((module.classes.weight.grad.abs().amax(1) > 0).tolist()) == has
        assert bool(module.cond.weight.grad.any()) == has[1]


@pytest.mark.parametrize(
    ("which", "cond", "message"),
    [
        (None, torch.zeros(5, 3), r"built without conditions \(cond_dim=0, classes=0\)"),
        (None, {}, "built without conditions"),
        ("features", torch.zeros(5, 2), r"cond must have shape \(5, 3\) for the features, got \(5, 2\)"),
        ("features", torch.zeros(1, 3), r"cond must have shape \(5, 3\)"),
        ("features", torch.zeros(3), r"cond must have shape \(5, 3\)"),
        ("features", dict(classes=torch.zeros(5, dtype=torch.long)), "takes features only"),
        ("classes", torch.zeros(4, dtype=torch.long), r"integers of shape \(5,\) from 0 to 4 .* got torch.int64"),
        ("classes", torch.zeros(5, 1, dtype=torch.long), r"of shape \(5, 1\)"),
        ("classes", torch.zeros(5, 4, dtype=torch.long), r"weights of shape \(5, 4\); got torch.int64"),
        ("classes", torch.zeros(5), r"weights of shape \(5, 4\); got torch.float32 of shape \(5,\)"),
        ("classes", torch.zeros(5, 5), r"got torch.float32 of shape \(5, 5\)"),
        ("classes", dict(features=torch.zeros(5, 3)), "takes classes only"),
        ("both", torch.zeros(5, 3), r"give cond=dict\(classes=..., features=...\)"),
        ("both", torch.zeros(5, dtype=torch.long), r"give cond=dict\(classes=..., features=...\)"),
        ("both", dict(features=torch.zeros(5, 4)), r"cond must have shape \(5, 3\)"),
        ("both", dict(classes=torch.zeros(5)), "class labels must be integers"),
        ("both", dict(label=1, kind=2), "keys 'classes' and 'features', got kind, label as well"),
    ],
)
def test_wrong_conditions(which, cond, message):
    """Refused in words, with the shape that was wanted and the one that was given; in training too."""
    module = embed(**CONDITIONS.get(which, {}), drop_cond=0.5)
    for training in (False, True):
        module.train(training)
        with pytest.raises(ValueError, match=message):
            module(normal(5), cond)


@pytest.mark.parametrize("label", [5, -1])
def test_classes_out_of_range(label):
    """An error on the CPU, where looking is free; no row of another class is taken."""
    with pytest.raises((IndexError, ValueError)):
        embed(classes=4)(normal(2), torch.tensor([0, label]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="cosine"), "unknown noise embedding 'cosine'; use one of sinusoidal, positional, fourier"),
        (dict(join="input"), "join must be 'hidden' or 'output', got 'input'"),
        (dict(drop_cond=1.0), r"drop_cond must lie in \[0, 1\), got 1.0"),
        (dict(drop_cond=-0.1), "drop_cond must lie"),
    ],
)
def test_wrong_options(options, message):
    """Said when the embedding is built."""
    with pytest.raises(ValueError, match=message):
        WithCondition(4, **options)


@JOIN
@KIND
def test_derivatives(kind, join):
    """By the label, class weights and features: forward mode, reverse mode and central differences agree."""
    module = embed(kind=kind, join=join, scale=0.5, classes=4, cond_dim=3).double()
    point = tuple(u.double() for u in (normal(5), condition("classes", 5, soft=True), condition("features", 5)))
    step = tuple(normal(*u.shape, seed=20 + i, dtype=torch.float64) for i, u in enumerate(point))
    row = normal(5, 8, seed=30, dtype=torch.float64)

    def run(label, classes, features):
        return module(label, dict(classes=classes, features=features))

    _, forward = torch.func.jvp(run, point, step)
    back = torch.func.vjp(run, *point)[1](row)
    reverse = sum((a * b).sum() for a, b in zip(back, step, strict=True))
    torch.testing.assert_close((forward * row).sum(), reverse, rtol=1e-10, atol=1e-12)
    ahead, behind = (run(*(u + s * v for u, v in zip(point, step, strict=True))) for s in (1e-5, -1e-5))
    torch.testing.assert_close(forward, (ahead - behind).detach() / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@EACH
def test_dtypes(which, dtype):
    """The result has the parameters' dtype, whatever the label's and the condition's."""
    module, cond = embed(drop_cond=0.5, **CONDITIONS[which]), condition(which, 5, soft=True)
    expected = module(normal(5), cond)
    module.to(dtype)
    for training in (False, True):
        out = module.train(training)(normal(5), cond)
        assert out.dtype == dtype
        if not training:
            torch.testing.assert_close(out.float(), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "size"), [("positional", 999.0), ("fourier", 2.0), ("sinusoidal", 2.0)])
def test_low_precision_parameters_leave_the_angles_alone(kind, size):
    """Features of a float32 label in a bfloat16 module are those of float32, rounded once."""
    module, label = embed(kind=kind, frequencies=16), size * torch.rand(50, generator=torch.Generator().manual_seed(3))
    low = copy.deepcopy(module).to(torch.bfloat16)
    torch.testing.assert_close(features(low, label).float(), features(module, label), atol=0.005, rtol=0)


@KIND
def test_integer_noise_labels(kind):
    """0 ... 999 as integers are the same labels as in floating point."""
    module, label = embed(kind=kind), torch.tensor([0, 1, 2, 17])
    torch.testing.assert_close(module(label), module(label.float()))


def test_devices_autocast_and_integer_widths(device):
    """Under autocast with dropping, on each device: near float32. int32 labels are as good as int64."""
    module, label = embed(classes=4, cond_dim=3, drop_cond=0.5).to(device), normal(5).to(device)
    cond = {k: v.to(device) for k, v in condition("both", 5).items()}
    expected = module(label, cond)
    torch.testing.assert_close(module(label, cond | dict(classes=cond["classes"].int())), expected)
    soft = cond | dict(classes=F.one_hot(cond["classes"], 4).float())
    torch.testing.assert_close(module(label, soft), expected)
    for given in (cond, soft):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = module.eval()(label, given)
            module.train()(label, given).float().sum().backward()
        torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0)
        assert all(bool(p.grad.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("name", ["MLP", "LeanUNet", "UNet"])
def test_networks_tell_each_example_what_is_its_own(name):
    """Each row of a network's result has its own x, label and condition, in training too, where some are dropped."""
    torch.manual_seed(0)
    options, shape = dict(classes=4, cond_dim=3), () if name == "MLP" else (4, 4)
    net = {
        "MLP": lambda: MLP(2, width=8, **options),
        "LeanUNet": lambda: LeanUNet(2, 2, shape, channels=(8,), blocks=(1,), dropout=0.0, **options),
        "UNet": lambda: UNet(2, 2, shape, width=8, multipliers=(1,), blocks=1, attention=(4,), **options),
    }[name]().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)
    x, label, cond = normal(3, 2, *shape), normal(3), condition("both", 3)
    out, none = net(x, label, cond).detach(), net(x, label).detach()
    for i in range(3):
        row = slice(i, i + 1)
        own = net(x[row], label[row], {k: v[row] for k, v in cond.items()})
        torch.testing.assert_close(own, out[row], atol=1e-5, rtol=1e-4)
    others = [net(x, label, cond | {k: v.flip(0)}) for k, v in cond.items()]
    for changed in (net(x, label + 0.3, cond), none, *others):
        moved = (changed - out).detach().abs().flatten(1).amax(1)
        assert float(moved[[0, 2]].min()) > 1e-4
    net.conditions.drop = 0.5
    torch.manual_seed(0)
    dropped = torch.rand(3) < 0.5
    assert 0 < int(dropped.sum()) < 3
    torch.manual_seed(0)
    expected = torch.where(dropped.reshape(3, *(1,) * (x.dim() - 1)), none, out)
    torch.testing.assert_close(net.train()(x, label, cond), expected, atol=1e-5, rtol=1e-4)


def test_conditions_that_are_no_tensors_or_out_of_range():
    """Lists, numbers, booleans and labels beyond the classes are refused in words."""
    net = WithCondition(8, classes=5).eval()
    label = torch.zeros(2)
    for bad in ([0, 1], 3, "one"):
        with pytest.raises(TypeError, match="tensors"):
            net(label, bad)
    for bad in (
        torch.tensor([True, False]),
        torch.tensor([0, 6]),
        torch.tensor([-1, 0]),
        torch.zeros(2, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="class labels must be integers"):
            net(label, bad)
    with pytest.raises(ValueError, match=r"shape \(B,\)"):
        net(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="at least"):
        Conditions(classes=-1)
