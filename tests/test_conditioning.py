"""Conditions of every kind in every network: what each adds, checks, dropping by kind, masks, and channels beside x."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from scoresde import VPSDE, Hutchinson, ScoreNet, log_prob, sample
from scoresde.nets import MLP, NETS, DiT, LeanUNet, UNet
from scoresde.nets.conditioning import KINDS, NUMBER_FREQUENCIES, ConditionalEmbedding, Conditions, mean_over_tokens

ALL = dict(classes=4, features=3, numbers=2, tokens=5, pooled=6, spatial=2)
OPTIONS = {("cond_dim" if k == "features" else k): n for k, n in ALL.items()}
VECTORS = [k for k in KINDS if k != "spatial"]
SHAPE = (2, 4, 6)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def condition(batch, kinds=KINDS, size=SHAPE[1:]):
    """A condition with a value of each kind, in which the last example has a token less than the others."""
    mask = torch.ones(batch, 3, dtype=torch.bool)
    mask[-1:, 2] = False
    values = dict(
        classes=torch.arange(batch) % 4,
        features=normal(batch, 3, seed=1),
        numbers=torch.tensor([[512.0, 31.0]]).expand(batch, 2) + torch.arange(batch)[:, None],
        tokens=normal(batch, 3, 5, seed=2),
        pooled=normal(batch, 6, seed=3),
        spatial=normal(batch, 2, *size, seed=4),
    )
    return {k: values[k] for k in kinds} | (dict(mask=mask) if "tokens" in kinds else {})


def redrawn(net, scale=0.3):
    """All parameters drawn anew, so that every part shows in the result."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return net.eval()


def network(name, **options):
    """A small network of each kind, and the shape of its examples."""
    options = (OPTIONS if name != "MLP" else {k: n for k, n in OPTIONS.items() if k != "spatial"}) | options
    make = {
        "MLP": lambda: MLP(5, width=8, depth=1, embedding=8, **options),
        "UNet": lambda: UNet(2, 2, (4, 6), width=8, multipliers=(1, 1), blocks=1, attention=(), **options),
        "LeanUNet": lambda: LeanUNet(2, 2, (4, 6), channels=(8,), blocks=(1,), embedding=8, dropout=0.0, **options),
        "DiT": lambda: DiT(2, 2, (4, 6), width=8, depth=2, heads=2, frequencies=8, **options),
        "DiT, own embeddings": lambda: DiT(
            2, 2, (4, 6), width=8, depth=2, heads=2, frequencies=8, shared_embedding=False, **options
        ),
    }[name]
    torch.manual_seed(0)
    return redrawn(make()), (5,) if name == "MLP" else SHAPE


EACH = pytest.mark.parametrize("name", ["MLP", "UNet", "LeanUNet", "DiT", "DiT, own embeddings"])


def kinds_of(net):
    return net.conditions.kinds


@pytest.mark.parametrize("join", ["hidden", "output"])
def test_definition(join):
    """The sum of what the kinds contribute joins the hidden layer or the output of the noise embedding, written out."""
    conditions = Conditions(**ALL | dict(spatial=0))
    embed = redrawn(ConditionalEmbedding(8, conditions, 6, join=join))
    label, cond = normal(4), condition(4, VECTORS)
    omega = torch.tensor([10000 ** (-j / (NUMBER_FREQUENCIES - 1)) for j in range(NUMBER_FREQUENCIES)])
    angles = torch.cat([cond["numbers"][:, [i]] * omega for i in range(2)], 1)
    added = embed.classes.weight[cond["classes"]] + cond["features"] @ embed.cond.weight.T
    added = added + torch.cat([angles.sin(), angles.cos()], 1) @ embed.numbers.weight.T
    means = torch.stack([row[m].mean(0) for row, m in zip(cond["tokens"], cond["mask"], strict=True)])
    added = added + means @ embed.tokens.weight.T + cond["pooled"] @ embed.pooled.weight.T
    angle = label[:, None] * embed.frequencies
    h = torch.cat([angle.sin(), angle.cos()], 1) @ embed.first.weight.T + embed.first.bias
    h = F.silu(h + added if join == "hidden" else h) @ embed.second.weight.T + embed.second.bias
    expected = F.silu(h + added if join == "output" else h)
    torch.testing.assert_close(embed(label, conditions.read(cond, label)), expected, atol=1e-4, rtol=1e-4)


@EACH
def test_every_kind_reaches_the_network(name):
    """Each changes every example's result and no other example's; what is missing is as nothing at all."""
    net, shape = network(name)
    x, label, kinds = normal(3, *shape, seed=6), normal(3, seed=7), kinds_of(net)
    assert set(kinds) == set(VECTORS if name == "MLP" else KINDS)
    cond = condition(3, kinds)
    whole, none = net(x, label, cond).detach(), net(x, label).detach()
    assert torch.equal(net(x, label, {}), none)
    for kind in kinds:
        given = {k: v for k, v in cond.items() if k == kind or (k, kind) == ("mask", "tokens")}
        alone = net(x, label, given).detach()
        assert float((alone - none).abs().flatten(1).amax(1).min()) > 1e-4, kind
        missing = {k: v for k, v in cond.items() if k not in given}
        torch.testing.assert_close(net(x, label, missing | {kind: None}), net(x, label, missing))
    for i in range(3):
        row = slice(i, i + 1)
        own = net(x[row], label[row], {k: v[row] for k, v in cond.items()})
        torch.testing.assert_close(own.detach(), whole[row], atol=1e-4, rtol=1e-4)


@EACH
def test_one_kind_may_be_given_by_itself(name):
    """A network with one kind takes the tensor as it is."""
    for kind in ("numbers", "tokens", "pooled") + (("spatial",) if name != "MLP" else ()):
        only = dict.fromkeys(OPTIONS if name != "MLP" else set(OPTIONS) - {"spatial"}, 0) | {kind: ALL[kind]}
        net, shape = network(name, **only)
        x, label, value = normal(2, *shape, seed=6), normal(2, seed=7), condition(2)[kind]
        assert torch.equal(net(x, label, value), net(x, label, {kind: value}))


def test_tokens_that_do_not_count_are_inert():
    """Whatever they hold, NaN included; their number and the order of the others make no difference either."""
    net, shape = network("UNet")
    x, label, cond = normal(3, *shape, seed=6), normal(3, seed=7), condition(3)
    expected = net(x, label, cond)
    tokens, mask = cond["tokens"], cond["mask"]
    spoiled = cond | dict(tokens=torch.where(mask[:, :, None], tokens, torch.nan))
    assert torch.equal(net(x, label, spoiled), expected)
    longer = cond | dict(tokens=torch.cat([tokens, normal(3, 4, 5)], 1), mask=F.pad(mask, (0, 4)))
    torch.testing.assert_close(net(x, label, longer), expected)
    order = [2, 0, 1]
    torch.testing.assert_close(net(x, label, cond | dict(tokens=tokens[:, order], mask=mask[:, order])), expected)
    every = cond | dict(mask=torch.ones_like(mask))
    without_mask = {k: v for k, v in cond.items() if k != "mask"}
    torch.testing.assert_close(net(x, label, without_mask), net(x, label, every))
    assert float((net(x, label, every) - expected)[2].detach().abs().max()) > 1e-4  # where a token did not count
    nothing = cond | dict(mask=torch.zeros_like(mask))
    torch.testing.assert_close(net(x, label, nothing), net(x, label, cond | dict(tokens=None, mask=None)))
    assert torch.equal(mean_over_tokens(torch.ones(2, 0, 5), None), torch.zeros(2, 5))


@EACH
def test_all_of_a_condition_is_dropped_together(name):
    """With one probability an example keeps every kind or loses every kind, spatial channels included; in training only."""
    net, shape = network(name, drop_cond=0.3)
    x, label = normal(1, *shape, seed=6).expand(600, *shape), torch.full((600,), 0.5)
    cond = {k: v[:1].expand(600, *v.shape[1:]) for k, v in condition(1, kinds_of(net)).items()}
    kept, none = net(x, label, cond), net(x, label)
    torch.manual_seed(0)
    out = net.train()(x, label, cond)
    is_kept, is_none = (torch.isclose(out, v, atol=1e-4, rtol=1e-4).flatten(1).all(1) for v in (kept, none))
    assert bool((is_kept ^ is_none).all())
    assert abs(float(is_none.float().mean()) - 0.3) < 0.08  # four standard deviations
    torch.testing.assert_close(net(x, label), none)


def test_kinds_are_dropped_each_by_its_probability():
    """Independently of each other, beside the probability of losing all; the null of each kind stands in its place."""
    rates = dict(all=0.2, classes=0.5, tokens=0.3, numbers=0.4)
    conditions = Conditions(**ALL, drop=rates)
    x, n = torch.zeros(4000, 2, 1, 1), 4000
    cond = condition(n, size=(1, 1))
    whole = conditions.read(cond, x)
    torch.manual_seed(0)
    parts = conditions.read(cond, x, training=True)
    lost = dict(
        classes=parts.classes == 4,
        tokens=~parts.mask.any(1),
        **{k: (getattr(parts, k) == 0).flatten(1).all(1) for k in ("numbers", "features", "pooled", "spatial")},
    )
    every = lost["features"]
    assert all(torch.equal(lost[k], every) for k in ("pooled", "spatial"))
    for kind, value in lost.items():
        rate = 1 - 0.8 * (1 - rates.get(kind, 0.0))
        assert abs(float(value.float().mean()) - rate) < 0.035, kind
        assert bool((value | ~every).all()), kind
        field = "mask" if kind == "tokens" else kind
        assert torch.equal(
            getattr(parts, field)[~value], (cond["mask"] if field == "mask" else getattr(whole, field))[~value]
        )
    alone = {k: lost[k][~every].float() for k in ("classes", "tokens", "numbers")}
    for a, b in (("classes", "tokens"), ("classes", "numbers"), ("tokens", "numbers")):
        together = float((alone[a] * alone[b]).mean())
        assert abs(together - rates[a] * rates[b]) < 0.035
    weights = torch.softmax(normal(n, 4), 1)
    torch.manual_seed(0)
    soft = conditions.read(cond | dict(classes=weights), x, training=True).classes
    assert torch.equal(soft[lost["classes"]], torch.tensor([0.0, 0, 0, 0, 1]).expand(int(lost["classes"].sum()), 5))
    assert torch.equal(soft[~lost["classes"], :4], weights[~lost["classes"]])
    assert torch.equal(conditions.read(cond, x).classes, cond["classes"])  # not in evaluation


def test_spatial_conditions_are_channels_beside_x():
    """Of a convolution, those after x's own, untouched by a rescaling of the data."""
    net, shape = network("UNet", rescale_input=True)
    seen = []
    handle = net.enter.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x, label, cond = normal(2, *shape), normal(2), condition(2)
    net(x, label, cond)
    net(x, label)
    handle.remove()
    assert torch.equal(seen[0], torch.cat([2 * x - 1, cond["spatial"]], 1))
    assert torch.equal(seen[1], torch.cat([2 * x - 1, torch.zeros(2, 2, 4, 6)], 1))


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        (dict(numbers=torch.zeros(3, 3)), ValueError, r"shape \(3, 2\) for the numbers, got \(3, 3\)"),
        (dict(pooled=torch.zeros(2, 6)), ValueError, r"shape \(3, 6\) for the pooled, got \(2, 6\)"),
        (dict(spatial=torch.zeros(3, 2, 4, 4)), ValueError, r"\(3, 2, 4, 6\) for the spatial, got \(3, 2, 4, 4\)"),
        (dict(tokens=torch.zeros(3, 7, 4)), ValueError, r"shape \(3, 7, 5\) for the tokens, got \(3, 7, 4\)"),
        (dict(tokens=torch.zeros(3, 5)), ValueError, r"for the tokens, got \(3, 5\)"),
        (
            dict(tokens=torch.zeros(3, 7, 5), mask=torch.ones(3, 6, dtype=torch.bool)),
            ValueError,
            r"\(3, 7\) for the mask",
        ),
        (
            dict(tokens=torch.zeros(3, 7, 5), mask=torch.ones(3, 7)),
            TypeError,
            r"booleans, got torch.float32; .* \.bool\(\)",
        ),
        (dict(mask=torch.ones(3, 7, dtype=torch.bool)), ValueError, "a mask but no tokens"),
        (
            dict(pooled=torch.zeros(3, 6, dtype=torch.complex64)),
            TypeError,
            "real numbers, got torch.complex64 for pooled",
        ),
        (dict(numbers=[[1.0, 2.0]] * 3), TypeError, "tensors, got list"),
        (dict(text=torch.zeros(3, 6)), ValueError, "'pooled', 'spatial' and 'mask', got text as well"),
        (torch.zeros(3, 6), ValueError, r"give cond=dict\(classes=..., features=..., numbers=..., tokens=..., pooled="),
    ],
)
def test_conditions_that_do_not_fit(cond, error, message):
    """Refused in words, with the shape that was wanted and the one that was given."""
    net, shape = network("UNet")
    with pytest.raises(error, match=message):
        net(torch.zeros(3, *shape), torch.zeros(3), cond)


def test_kinds_that_a_network_does_not_take():
    """A condition for which there is no place is never left out silently."""
    net, shape = network("DiT", **dict.fromkeys(OPTIONS, 0) | dict(numbers=2, pooled=6))
    with pytest.raises(ValueError, match=r"takes numbers and pooled only; .* something else: tokens"):
        net(torch.zeros(3, *shape), torch.zeros(3), dict(tokens=torch.zeros(3, 7, 5)))
    with pytest.raises(ValueError, match=r"takes numbers and pooled only; .* something else: mask"):
        net(torch.zeros(3, *shape), torch.zeros(3), dict(mask=torch.zeros(3, 7) > 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(classes=2, drop=dict(tokens=0.1)), "drop_cond may name all, classes in this network, got tokens"),
        (dict(classes=2, drop=dict(classes=1.0)), r"drop_cond must lie in \[0, 1\)"),
        (dict(classes=2, drop=math.nan), r"drop_cond must lie in \[0, 1\), got nan"),
        (dict(features=-1), "cond_dim must be at least 0, got -1"),
        (dict(spatial=-1), "spatial must be at least 0, got -1"),
        (dict(classes=2, null_class=False, drop=dict(all=0.1)), "drop_cond needs null_class=True"),
        (dict(classes=2, null_class=False, drop=dict(classes=0.1)), "drop_cond needs null_class=True"),
    ],
)
def test_wrong_options(options, message):
    """Said when the network is built. Other kinds may be dropped where the class cannot be."""
    with pytest.raises(ValueError, match=message):
        Conditions(**options)
    Conditions(classes=2, features=2, null_class=False, drop=dict(features=0.1))


@EACH
def test_config_rebuilds_the_network(name):
    """By way of JSON, with probabilities by kind; the weights of one fit the other."""
    net, shape = network(name, drop_cond=dict(all=0.1, tokens=0.2))
    again = NETS[type(net).__name__](**json.loads(json.dumps(net.config))).eval()
    assert again.config == net.config
    again.load_state_dict(net.state_dict())
    given = normal(2, *shape), normal(2), condition(2, kinds_of(net))
    assert torch.equal(again(*given), net(*given))
    assert again.conditions == net.conditions


def test_old_networks_keep_their_parameters():
    """No condition, or classes and features: the names that files of older versions have."""
    for options, more in ((dict(), set()), (dict(classes=3, cond_dim=2), {"cond.weight", "classes.weight"})):
        net = MLP(2, width=8, embedding=8, **options)
        names = {k.removeprefix("embed.") for k in net.state_dict() if k.startswith("embed.")}
        assert names == {"frequencies", "first.weight", "first.bias", "second.weight", "second.bias"} | more


@pytest.mark.parametrize("training", [False, True])
def test_compiled_networks_agree(training):
    """One graph, with a dict of every kind, and with what dropping does to it in training."""
    net, shape = network("UNet", drop_cond=0.5)
    given, results = (normal(4, *shape), normal(4), condition(4)), []
    for call in (torch.compile(net.train(training), fullgraph=True, backend="aot_eager"), net):
        torch.manual_seed(0)
        results.append(call(*given))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert bool((results[0] - net.eval()(*given)).abs().max() > 1e-3) == training


def test_low_precision_networks_see_numbers_as_they_are():
    """Crops of a thousand pixels: in bfloat16, which cannot tell 1001 from 1003, the angles stay those of float32."""
    conditions = Conditions(numbers=1)
    embed = redrawn(ConditionalEmbedding(8, conditions)).to(torch.bfloat16)
    label = torch.zeros(2)
    parts = conditions.read(torch.tensor([[1001.0], [1003.0]]), label)
    expected = torch.tensor([[1001.0], [1003.0]]).sin()
    torch.testing.assert_close(parts.numbers[:, :1], expected)
    assert embed(label, parts).dtype == torch.bfloat16
    integers = conditions.read(torch.tensor([[1001], [1003]]), label)
    assert torch.equal(integers.numbers, parts.numbers)


def test_samplers_and_likelihoods_hand_conditions_on():
    """A dict with a mask through a solve that refines some examples alone: each example as by itself."""
    torch.manual_seed(0)
    net = redrawn(UNet(2, 2, (2, 3), width=4, multipliers=(1,), blocks=1, attention=(), group_channels=2, **OPTIONS))
    model, cond, shape = ScoreNet(net, VPSDE(), "edm"), condition(3, size=(2, 3)), (2, 2, 3)
    one = {k: v[1:2] for k, v in cond.items()}
    x = sample(model, (3, *shape), method="ddim", steps=4, seed=[1, 2, 3], cond=cond)
    alone = sample(model, (1, *shape), method="ddim", steps=4, seed=[2], cond=one)
    torch.testing.assert_close(x[1:2], alone, atol=1e-4, rtol=1e-4)
    other = sample(model, (1, *shape), method="ddim", steps=4, seed=[2], cond=one | dict(mask=one["mask"] & False))
    assert float((other - alone).abs().max()) > 1e-3
    options = dict(divergence=Hutchinson(1), rtol=0.1, atol=0.1, seed=[1, 2, 3])
    values = log_prob(model, x, cond=cond, **options).value
    assert bool(values.isfinite().all())
    assert float((values - log_prob(model, x, **options).value).abs().min()) > 1e-3
