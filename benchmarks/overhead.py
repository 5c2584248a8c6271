"""What a sampler costs beyond its network: ours beside those of other libraries.

    python benchmarks/overhead.py [--repeats 15] [--methods ddim pc diffusers/ddim] [--device cpu] [--json FILE]

For the perceptron and the U-Net: time of the whole sampler over (NFE x one bare forward pass). For the null network,
which returns its input: microseconds per NFE. One thread; CPU time, or wall time on a GPU. Samplers take turns, each
followed by bare forward passes, and every figure is the median over the turns, so that a machine that slows down slows
both sides of a ratio. NFE are counted by a hook in a run of their own. All take 50 steps, except the adaptive "ode"
and "torchdiffeq/dopri5"; peers run as their documentation shows, set-up of the time grid included. Peers that are not
installed are said to be absent.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import METHODS, VPSDE, ScoreNet, sample
from scoresde.nets import MLP, LeanUNet
from scoresde.store import write_json

STEPS = 50
T_MIN = 1e-3  # where the peers' equations stop


class Null(nn.Module):
    """The network that costs nothing."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x


class Near(nn.Module):
    """x plus a little of a network's output: untrained, but as tame as a trained one along the whole path."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return torch.add(x, self.net(x, label), alpha=0.1)


@dataclass(frozen=True)
class Problem:
    """A network, the shape of a batch, and how many bare forward passes are timed after each sampler."""

    net: nn.Module
    shape: tuple[int, ...]
    passes: int


def problems(device: torch.device) -> dict[str, Problem]:
    """The three networks, with outputs that are not zero."""
    torch.manual_seed(0)
    found = {
        "mlp": Problem(Near(MLP(2, width=128, depth=3)), (512, 2), 50),
        "unet": Problem(Near(LeanUNet(1, 1, (8, 8))), (4, 1, 8, 8), 25),
        "null": Problem(Null(), (512, 2), 50),
    }
    for problem in found.values():
        problem.net.to(device).eval()
        for p in problem.net.parameters():
            if not bool(p.any()):
                nn.init.normal_(p, std=0.02)
    return found


# -- samplers: (net, shape, device) -> a function that draws one batch -----------------------------------------------

Build = Callable[[nn.Module, tuple[int, ...], torch.device], Callable[[], Tensor]]


def ours(method: str) -> Build:
    """`sample` with a method of METHODS: 50 steps, or what an adaptive method takes."""

    def build(net: nn.Module, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
        model = ScoreNet(net, VPSDE(), "noise")
        steps = None if method == "ode" else STEPS
        return lambda: sample(model, shape, method=method, steps=steps, seed=0)

    return build


def diffusers(kind: str, **options: Any) -> Build:
    """The loop of a pipeline: set_timesteps, then network and step in turn."""

    def build(net: nn.Module, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
        scheduler = getattr(importlib.import_module("diffusers"), kind)(**options)

        @torch.no_grad()
        def draw() -> Tensor:
            scheduler.set_timesteps(STEPS, device=device)
            x = torch.randn(shape, device=device)
            for t in scheduler.timesteps:
                noise = net(scheduler.scale_model_input(x, t), ((t + 1) / 1000).expand(shape[0]))
                x = scheduler.step(noise, t, x, return_dict=False)[0]
            return x

        return draw

    return build


def azula(kind: str, **options: Any) -> Build:
    """A sampler on azula's own preconditioned denoiser and VP schedule."""

    class Backbone(nn.Module):
        def __init__(self, net: nn.Module):
            super().__init__()
            self.net = net
            self.register_buffer("kind", torch.zeros(()))  # a network without parameters has no dtype to ask for

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return self.net(x, label.expand(x.shape[0]))

    def build(net: nn.Module, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
        library = importlib.import_module("azula")
        denoiser = library.denoise.SimpleDenoiser(Backbone(net), library.noise.VPSchedule()).to(device)
        sampler = getattr(library.sample, kind)(denoiser, steps=STEPS, silent=True, device=device, **options)
        return lambda: sampler(sampler.init(shape, device=device))

    return build


def _velocity(net: nn.Module, sde: VPSDE) -> Callable[[Tensor, Tensor], Tensor]:
    """The probability flow of VP from a noise network, as one writes it out."""

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        t = t.clamp_min(T_MIN)  # an adaptive solver looks past its end
        beta = sde.beta_min + t * (sde.beta_max - sde.beta_min)
        integral = t * (sde.beta_min + 0.5 * t * (sde.beta_max - sde.beta_min))
        return 0.5 * beta * (net(x, t.expand(x.shape[0])) * torch.rsqrt(-torch.expm1(-integral)) - x)

    return velocity


def flow_matching_euler(net: nn.Module, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    """`ODESolver` with Euler steps; the network is taken for the velocity."""
    solver = importlib.import_module("flow_matching.solver").ODESolver(
        velocity_model=lambda x, t: net(x, t.expand(shape[0]))
    )
    return lambda: solver.sample(x_init=torch.randn(shape, device=device), step_size=1 / STEPS, method="euler")


def torchdiffeq(method: str, **options: Any) -> Build:
    """`odeint` on the probability flow."""

    def build(net: nn.Module, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
        odeint = importlib.import_module("torchdiffeq").odeint
        velocity = _velocity(net, VPSDE())
        steps = 1 if options else STEPS
        times = torch.linspace(1.0, T_MIN, steps + 1, device=device)

        @torch.no_grad()
        def draw() -> Tensor:
            return odeint(velocity, torch.randn(shape, device=device), times, method=method, **options)[-1]

        return draw

    return build


def torchsde(*, brownian_dt: bool) -> Build:
    """`sdeint` with Euler steps on the reverse SDE, with or without the step size given to the Brownian path."""

    def build(net: nn.Module, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
        library = importlib.import_module("torchsde")
        sde = VPSDE()
        velocity = _velocity(net, sde)

        class Reverse(nn.Module):
            noise_type, sde_type = "diagonal", "ito"

            def f(self, s: Tensor, y: Tensor) -> Tensor:
                t = 1 - s  # f x - g^2 score, backwards: twice the flow less f x
                beta = sde.beta_min + t * (sde.beta_max - sde.beta_min)
                return -(2 * velocity(t, y.reshape(shape)).flatten(1) + 0.5 * beta * y)

            def g(self, s: Tensor, y: Tensor) -> Tensor:
                return (sde.beta_min + (1 - s) * (sde.beta_max - sde.beta_min)).sqrt().expand(y.shape)

        reverse, dt = Reverse(), (1 - T_MIN) / STEPS * (1 + 1e-6)  # no sliver of a last step
        ends = torch.tensor([0.0, 1 - T_MIN], device=device)

        @torch.no_grad()
        def draw() -> Tensor:
            y = torch.randn(shape, device=device).flatten(1)
            path = None
            if brownian_dt:
                path = library.BrownianInterval(t0=0.0, t1=1.0, size=y.shape, dt=dt, device=device)
            return library.sdeint(reverse, y, ends, bm=path, method="euler", dt=dt)[-1].reshape(shape)

        return draw

    return build


SAMPLERS: dict[str, Build] = {
    **{name: ours(name) for name in METHODS},
    "diffusers/ddim": diffusers("DDIMScheduler", clip_sample=False),
    "diffusers/dpm++2m": diffusers("DPMSolverMultistepScheduler"),
    "diffusers/unipc2": diffusers("UniPCMultistepScheduler"),
    "azula/ddim": azula("DDIMSampler"),
    "azula/heun": azula("HeunSampler"),
    "azula/xeab2": azula("xEABSampler", order=2),
    "flow_matching/euler": flow_matching_euler,
    "torchdiffeq/euler": torchdiffeq("euler"),
    "torchdiffeq/dopri5": torchdiffeq("dopri5", rtol=1e-4, atol=1e-4),
    "torchsde/euler": torchsde(brownian_dt=False),
    "torchsde/euler-dt": torchsde(brownian_dt=True),
}


def installed(name: str) -> bool:
    """Whether the library of a sampler "library/name" can be imported; ours always can."""
    if "/" not in name:
        return True
    try:
        importlib.import_module(name.split("/")[0])
    except ImportError:
        return False
    return True


# -- measurement -----------------------------------------------------------------------------------------------------


@dataclass
class Turns:
    """One sampler on one problem: its evaluations, and per turn its seconds and those of one bare forward pass."""

    draw: Callable[[], Tensor]
    nfe: int
    seconds: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def ratio(self) -> float:
        """Median of sampler over (NFE x bare forward)."""
        return _median([s / (self.nfe * b) for s, b in zip(self.seconds, self.bare, strict=True)])

    def microseconds(self) -> float:
        """Median time per evaluation, the network's own included."""
        return 1e6 * _median([s / self.nfe for s in self.seconds])


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def count(net: nn.Module, draw: Callable[[], Tensor]) -> int:
    """Evaluations of the network in one run, which also warms up."""
    calls = [0]

    def tick(*_: Any) -> None:
        calls[0] += 1

    handle = net.register_forward_hook(tick)
    try:
        draw()
    finally:
        handle.remove()
    return calls[0]


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of CPU time, or of wall time until a GPU is done."""
    if device.type == "cpu":
        clock = time.process_time()
        work()
        return time.process_time() - clock
    torch.cuda.synchronize(device)
    clock = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - clock


def measure(problem: Problem, names: Sequence[str], repeats: int, device: torch.device) -> dict[str, Turns]:
    """Every sampler on one problem, in turns."""
    x, label = torch.randn(problem.shape, device=device), torch.full((problem.shape[0],), 0.5, device=device)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(problem.passes):
            problem.net(x, label)

    found = {}
    for name in names:
        draw = SAMPLERS[name](problem.net, problem.shape, device)
        found[name] = Turns(draw, count(problem.net, draw))
    for _ in range(repeats):
        for turns in found.values():
            turns.seconds.append(timed(turns.draw, device))
            turns.bare.append(timed(bare, device) / problem.passes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    device = torch.device(args.device)
    here = [name for name in args.methods if installed(name)]
    absent = [name for name in args.methods if name not in here]
    found = {}
    for kind, problem in problems(device).items():
        found[kind] = measure(problem, here, args.repeats, device)
        bare = _median([b for turns in found[kind].values() for b in turns.bare])
        size = "x".join(map(str, problem.shape))
        print(f"{kind}: batch {size}, {1e6 * bare:.0f} us a bare forward pass", flush=True)
    print(f"{'sampler':22s} {'NFE':>5s} {'mlp':>7s} {'unet':>7s} {'null, us/NFE':>13s}")
    rows = []
    for name in here:
        mlp, unet, null = (found[kind][name] for kind in ("mlp", "unet", "null"))
        row = {
            "sampler": name,
            "nfe": {"mlp": mlp.nfe, "unet": unet.nfe, "null": null.nfe},
            "mlp_ratio": mlp.ratio(),
            "unet_ratio": unet.ratio(),
            "null_microseconds_per_nfe": null.microseconds(),
        }
        rows.append(row)
        print(
            f"{name:22s} {mlp.nfe:5d} {row['mlp_ratio']:7.3f} {row['unet_ratio']:7.3f} "
            f"{row['null_microseconds_per_nfe']:13.1f}",
            flush=True,
        )
    for name in absent:
        print(f"{name:22s} absent")
    libraries = dict.fromkeys(name.split("/")[0] for name in here if "/" in name)
    versions = {name: importlib.metadata.version(name) for name in ("torch", *libraries)}
    write_json(
        args.json,
        {
            "device": args.device if device.type == "cpu" else torch.cuda.get_device_name(device),
            "steps": STEPS,
            "repeats": args.repeats,
            "versions": versions,
            "bare_microseconds": {
                kind: 1e6 * _median([b for turns in of.values() for b in turns.bare]) for kind, of in found.items()
            },
            "rows": rows,
            "absent": absent,
        },
    )
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
