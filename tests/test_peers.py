"""Agreement with other libraries: the same model, start, times and noise, in float64.

`tests/reference/peers.json` holds where the peers end, so that agreement is tested where they are not installed too;
where they are, they also run here. Where a peer's formula differs from ours, orders of convergence say which is right.
"""

import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from scoresde import METHODS, VESDE, VPSDE, GaussianMixture, sample
from scoresde.rng import RandomSource
from scoresde.samplers import DDIM, Ancestral, Heun, Multistep, Sampler
from scoresde.sde import SDES


def load(path):
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the peers' NumPy calls

HERE = Path(__file__).parent
peers = load(HERE.parent / "benchmarks" / "peers.py")
REFERENCE = json.loads((HERE / "reference" / "peers.json").read_text())
CASES = {f"{case['sde']}-{case['path']}": case for case in REFERENCE["cases"]}


class Plain(Multistep):
    """Multistep without its second look at the first step, which the other libraries do not have."""

    def _corrector_nodes(self, step):
        return super()._corrector_nodes(step) if self.corrector else 0


@dataclass
class Row:
    """`ours`, a sampler or a name of METHODS, and the peer that it should equal on the processes `sdes`."""

    ours: Sampler | str
    peer: str
    sdes: tuple[str, ...] = ("VPSDE", "VESDE", "EDMSDE")

    def __str__(self):
        name = self.ours if isinstance(self.ours, str) else type(self.ours).__name__
        return f"{name}={self.peer}"


ROWS = [
    Row(Ancestral(), "diffusers/ddpm-small"),
    Row(Ancestral(), "azula/ddpm"),
    Row(Ancestral("large"), "diffusers/ddpm-large", ("VPSDE",)),  # the larger variance depends on the scale of x
    Row(DDIM(), "diffusers/ddim"),
    Row(DDIM(), "diffusers/euler"),
    Row(DDIM(), "azula/ddim"),
    Row(DDIM(), "azula/euler"),
    Row(DDIM(0.5), "diffusers/ddim-half"),
    Row(DDIM(0.5), "azula/ddim-quarter"),  # azula multiplies the variance by eta, the paper the deviation
    Row(Heun(), "diffusers/heun"),
    Row(Heun(), "azula/heun"),
    Row("dpm2", "diffusers/dpm2"),
    Row("dpm++2s", "diffusers/dpm++2s"),
    Row("dpm++2m", "diffusers/dpm++2m"),
    Row("sde-dpm++2m", "diffusers/sde-dpm++2m"),
    Row("unipc2", "diffusers/unipc2"),
    Row("unipc3", "diffusers/unipc3"),
    Row("ipndm", "diffusers/ipndm"),
    Row(Multistep("data", 2), "diffusers/dpm++2m-heun"),
    Row(Multistep("data", 2), "azula/xeab2"),
    Row(Plain("data", 3), "azula/xeab3"),
    Row(Multistep("noise", 2), "diffusers/deis2"),
    Row(Multistep("noise", 2), "azula/zeab2"),
    Row(Plain("noise", 3), "diffusers/deis3"),
    Row(Plain("noise", 3), "azula/zeab3"),
    Row(Multistep("noise", 2, variable="ratio"), "azula/zab2"),
    Row(Plain("noise", 3, variable="ratio"), "azula/zab3"),
    Row(Plain("noise", 4, variable="ratio"), "diffusers/lms4"),
    Row(Plain("noise", 4, variable="ratio"), "azula/zab4"),
]


def method(ours):
    """A sampler object; rows of methods that do not exist are skipped."""
    if isinstance(ours, str) and ours not in METHODS:
        pytest.skip(f"METHODS has no {ours}")
    return METHODS[ours]() if isinstance(ours, str) else ours


def solve(sampler):
    """Our sampler as a solver of benchmarks/peers.py: the noise is given, in the order in which it is used."""

    def run(model, x, times, noise=None):
        draws = iter(()) if noise is None else iter(noise)

        def normal(self, shape, dtype):
            value = next(draws, None)
            assert value is not None, "a deterministic method drew noise"
            return value.clone()

        with mock.patch.object(RandomSource, "normal", normal):
            return sample(model, x.shape, method=sampler, grid=times, x_init=x, denoise_final=False)

    return run


def inputs(case, ring8, name=None):
    """Model, start, times and noise of a case of the reference file; no noise for the deterministic peer `name`."""
    sde = SDES[case["sde"]]()
    starts, times, noise = (
        torch.tensor(v, dtype=torch.float64) for v in (REFERENCE["starts"], case["times"], REFERENCE["noise"])
    )
    deterministic = name is not None and peers.PEERS[name].order is not None
    return ring8.diffuse(sde), sde.prior_std * starts, times, None if deterministic else noise


def agree(a, b, rtol=1e-6):
    """Largest difference within rtol of the largest entry."""
    assert torch.isfinite(a).all()
    assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


def need(name):
    """The peer of that name, or a skip where its library is missing."""
    pytest.importorskip(peers.PEERS[name].library)
    return peers.PEERS[name]


# -- the same formula, the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_ours_ends_where_the_peer_ended(row, case, ring8):
    """Against the stored ends: 12 steps, 8 starts, 1e-6 relative."""
    if CASES[case]["sde"] not in row.sdes:
        pytest.skip("another formula on this process")
    sampler = method(row.ours)
    expected = torch.tensor(CASES[case]["ends"][row.peer], dtype=torch.float64)
    agree(solve(sampler)(*inputs(CASES[case], ring8, row.peer)), expected)


@pytest.mark.parametrize("name", peers.PEERS)
def test_the_peer_still_ends_there(name, ring8):
    """The stored ends are what the installed peer gives: every sampler, every case."""
    peer = need(name)
    for case in CASES.values():
        agree(peer.solve(*inputs(case, ring8, name)), torch.tensor(case["ends"][name], dtype=torch.float64))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_on_another_model(row, full3):
    """Both run here, on correlated Gaussians in three dimensions and a grid of uneven steps."""
    peer, sampler = need(row.peer), method(row.ours)
    g = torch.Generator().manual_seed(0)
    sde = VPSDE()
    steps = torch.rand(15, generator=g, dtype=torch.float64) + 0.2
    times = sde.t_max - (sde.t_max - 0.02) * torch.cat([steps.new_zeros(1), steps.cumsum(0) / steps.sum()])
    x, noise = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((5, 3), (15, 5, 3)))
    model = full3.diffuse(sde)
    noise = noise if peer.order is None else None
    agree(solve(sampler)(model, x, times, noise), peer.solve(model, x, times, noise))


def test_a_wrong_row_is_found(ring8):
    """Other samplers' ends are far outside the tolerance: the comparison can fail."""
    for case in CASES.values():
        x = solve(DDIM())(*inputs(case, ring8))
        for name, end in case["ends"].items():
            far = float((x - torch.tensor(end, dtype=torch.float64)).abs().max())
            assert (far > 1e-3) == (name not in ("diffusers/ddim", "diffusers/euler", "azula/ddim", "azula/euler")), (
                name
            )


# -- different formulas: the order says which is right ---------------------------------------------------------------


def third_order(second_difference):
    """DPM-Solver++(3M) with its second difference multiplied by a number; the second step is the midpoint rule.

    With l = log(alpha/sigma), h the step in l, and D as a function of l, the integral of exp(l - l_s) (D + u D' + u^2/2
    D'') over a step has weights phi_1, phi_2, phi_3. The quadratic through three nodes has D'' = 2 [D_0, D_1, D_2], a
    divided difference: a code that takes the divided difference itself for D'' loses an order.
    """

    def run(model, x, times, noise=None):
        alpha, sigma = model.sde.alpha(times), model.sde.sigma(times)
        level = alpha.log() - sigma.log()
        past = []
        for i in range(times.numel() - 1):
            past = [model.denoise(x, times[i]), *past[:2]]
            h, decay = level[i + 1] - level[i], torch.expm1(level[i] - level[i + 1])
            nodes = [(level[i] - level[i - k]) / h for k in range(len(past))]
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * decay * past[0]
            if len(past) == 2:
                x = x - 0.5 * alpha[i + 1] * decay * (past[0] - past[1]) / nodes[1]
            elif len(past) == 3:
                near = (past[0] - past[1]) / nodes[1]
                divided = (near - (past[1] - past[2]) / (nodes[2] - nodes[1])) / nodes[2]
                first, second = near + nodes[1] * divided, second_difference * divided
                x = x + alpha[i + 1] * ((decay / h + 1) * first - ((decay + h) / h**2 - 0.5) * second)
        return x

    return run


def test_third_order_needs_the_factor_two():
    """Taken for the second derivative, a divided difference gives order 2; twice it gives order 3."""
    assert peers.convergence(third_order(1.0))[0] == pytest.approx(2, abs=0.2)
    assert peers.convergence(third_order(2.0))[0] == pytest.approx(3, abs=0.2)


def test_diffusers_lacks_it():
    """Its third-order scheduler equals the formula without the factor, and so is of order 2."""
    peer = need("diffusers/dpm++3m")
    model, x = peers.smooth_flow()
    times = peers.graded_times(model.sde, 16)
    agree(peer.solve(model, x, times, None), third_order(1.0)(model, x, times), 1e-10)
    assert peers.convergence(peer.solve)[0] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("diffusers/ddim", 1),
        ("diffusers/heun", 2),
        ("diffusers/dpm++2m", 2),
        ("diffusers/dpm++2m-heun", 2),
        ("diffusers/unipc2", 3),  # the weight 1/2 of its predictor, a simplification, costs no order
        ("diffusers/unipc3", 4),
        ("diffusers/unipc3-lower", 2),  # as it comes: the last steps of lower order are what remains
        ("diffusers/deis2", 2),
        ("diffusers/lms4", 4),
        ("diffusers/ipndm", 2),  # its weights are those of equal steps in sigma/alpha, which these are not
        ("azula/xeab3", 3),
        ("azula/zeab3", 3),
        ("azula/reab2", 1),  # stated 2 and 3: one factor has the noise level of the step's other end
        ("azula/reab3", 1),
    ],
)
def test_orders_of_peers(name, order):
    """What each peer reaches on a smooth flow, whatever it says."""
    assert peers.convergence(need(name).solve)[0] == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("ddim", 1),
        ("heun", 2),
        ("dpm++2m", 2),
        ("dpm++3m", 3),
        ("unipc2", 2),
        ("unipc3", 3),
        ("deis", 3),
        ("lms", 3),
        ("dpm2", 2),
        ("dpm++2s", 2),
    ],
)
def test_orders_of_ours(name, order):
    """On the same flow and grids ours reach theirs, at least."""
    assert peers.convergence(solve(method(name)))[0] > order - 0.25


# -- the adapters themselves -----------------------------------------------------------------------------------------


def test_exact_flow_against_a_closed_form():
    """One Gaussian of variance v: the flow multiplies x / alpha by sqrt((v + r_s^2) / (v + r_t^2))."""
    model = GaussianMixture.isotropic([[0.0, 0.0]], 0.5).diffuse(VESDE())
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    high, low = peers.SPAN
    torch.testing.assert_close(
        peers.exact_flow(model, x), x * math.sqrt((0.25 + low**2) / (0.25 + high**2)), rtol=1e-11, atol=1e-12
    )


def test_float32_is_restored():
    """The name that the schedulers are lent means float32 again afterwards, also after an error."""
    with pytest.raises(KeyError), peers._float64():
        raise KeyError
    assert torch.zeros((), dtype=torch.float32).element_size() == 4
