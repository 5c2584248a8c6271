r"""Other libraries' samplers on any `ScoreModel`: the same model, start, times and noise, in float64.

    python benchmarks/peers.py                  # which libraries are there, and the order of each of their samplers
    python benchmarks/peers.py --write          # also renews tests/reference/peers.json

A peer is asked for its own step, with its tables overwritten by the noise levels of our time grid, so that nothing is
left of its integer timesteps and its float32. Its steps see the model through a rescaling of x, by which it can run on
every process: samplers of the VP family depend on (alpha, sigma) only through $r = \sigma/\alpha$, once x is divided by
its scale. With $c = 1/(\alpha\sqrt{1 + r^2})$ the state $c\,x$ is that of a VP process, and $x/\alpha$ that of a VE one.

`convergence` measures the order of a solver, ours or theirs, on the probability flow of an exact mixture.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scoresde import EDMSDE, VESDE, VPSDE, GaussianMixture, ScoreModel
from scoresde.grids import karras
from scoresde.sde import SDE

Solver = Callable[[ScoreModel, Tensor, Tensor, "Tensor | None"], Tensor]
"""(model, x at times[0], decreasing times (N + 1,), noise (N, B, *) or None) -> x at times[-1]."""

REFERENCE = Path(__file__).parents[1] / "tests" / "reference" / "peers.json"


@dataclass(frozen=True)
class Peer:
    """One sampler of another library: `order` as its authors state it (None for stochastic ones), `nfe` per step."""

    library: str
    solve: Solver
    order: int | None = None
    nfe: int = 1

    @property
    def installed(self) -> bool:
        """Whether the library can be imported here."""
        try:
            importlib.import_module(self.library)
        except ImportError:
            return False
        return True


# -- diffusers -------------------------------------------------------------------------------------------------------


def diffusers_ratio(
    kind: str, *, vp: bool, output: str, stages: str = "one", noisy: bool = False, **options: Any
) -> Solver:
    """A scheduler that keeps its noise levels as r in `sigmas`.

    Arguments: `vp`, whether its samples are those of a VP process (else x / alpha); `output`, what it is given,
    "sample" or "epsilon"; `stages`, how it takes a step: "one" evaluation, "heun" (both ends), "middle" (the start and
    the middle in log r, kept apart in `sigmas_interpol`) or "inserted" (the same, the middle being a time of its grid);
    `noisy`, whether its step is given noise; `options` of the scheduler.
    """

    def solve(model: ScoreModel, x: Tensor, times: Tensor, noise: Tensor | None = None) -> Tensor:
        sde = model.sde
        scheduler = _scheduler(kind, prediction_type=output, **options)
        at, levels = times[:-1], _ratio(sde, times)
        ends = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])  # r_0, r_1, r_1, r_2, r_2, ...
        middles = sde.time(-(levels[:-1] * levels[1:]).log())
        if stages == "heun":
            at, levels = torch.stack([times[:-1], times[1:]], 1).flatten(), ends
        elif stages != "one":
            at = torch.stack([times[:-1], middles], 1).flatten()
            levels = ends if stages == "middle" else _ratio(sde, torch.cat([at, times[-1:]]))
        scheduler.set_timesteps(at.numel() if stages == "inserted" else times.numel() - 1)
        scheduler.sigmas = levels
        if stages == "middle":
            mid = _ratio(sde, middles)
            scheduler.sigmas_interpol = torch.cat([levels[:1], mid.repeat_interleave(2)])
        scheduler.timesteps = torch.arange(at.numel(), 0, -1, dtype=torch.float64)
        scheduler.set_begin_index(0)
        scale = _vp_scale if vp else lambda sde, t: 1 / sde.alpha(t)
        z = scale(sde, times[0]) * x
        for i, (label, t) in enumerate(zip(scheduler.timesteps, at, strict=True)):
            prediction = model.predict(z / scale(sde, t), t)[output == "epsilon"]
            given = dict(variance_noise=noise[i]) if noisy else {}
            with _float64():
                scheduler.scale_model_input(z, label)  # some insist on being asked
                z = scheduler.step(prediction, label, z, return_dict=False, **given)[0]
        return z / scale(sde, times[-1])

    return solve


def diffusers_ddim(eta: float = 0.0) -> Solver:
    """`DDIMScheduler`, whose table of alpha^2 is indexed by the integer timestep."""

    def solve(model: ScoreModel, x: Tensor, times: Tensor, noise: Tensor | None = None) -> Tensor:
        steps, scale = times.numel() - 1, _vp_scale(model.sde, times)
        scheduler = _scheduler("DDIMScheduler", clip_sample=False, num_train_timesteps=steps)
        scheduler.set_timesteps(steps)
        bar = _vp_alpha(model.sde, times) ** 2
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = bar[:-1].flip(0), bar[-1]
        z = scale[0] * x
        for i in range(steps):
            eps = model.noise(z / scale[i], times[i])
            given = None if eta == 0 else noise[i]
            z = scheduler.step(eps, steps - 1 - i, z, eta=eta, variance_noise=given, return_dict=False)[0]
        return z / scale[-1]

    return solve


def diffusers_ddpm(variance: str) -> Solver:
    """`DDPMScheduler` with variance "fixed_small" or "fixed_large"; it would draw its noise itself."""

    def solve(model: ScoreModel, x: Tensor, times: Tensor, noise: Tensor | None = None) -> Tensor:
        steps, scale = times.numel() - 1, _vp_scale(model.sde, times)
        scheduler = _scheduler("DDPMScheduler", clip_sample=False, variance_type=variance)
        module = importlib.import_module(type(scheduler).__module__)
        scheduler.alphas_cumprod = (_vp_alpha(model.sde, times) ** 2).flip(0)  # index 0 is the last time
        z = scale[0] * x
        for i in range(steps):
            eps = model.noise(z / scale[i], times[i])
            with mock.patch.object(module, "randn_tensor", _always(noise[i])):
                z = scheduler.step(eps, steps - i, z, return_dict=False)[0]
        return z / scale[-1]

    return solve


def diffusers_ipndm() -> Solver:
    """`IPNDMScheduler`, which wants the velocity on the circle alpha^2 + sigma^2 = 1."""

    def solve(model: ScoreModel, x: Tensor, times: Tensor, noise: Tensor | None = None) -> Tensor:
        steps, scale, alpha = times.numel() - 1, _vp_scale(model.sde, times), _vp_alpha(model.sde, times)
        scheduler = _scheduler("IPNDMScheduler")
        scheduler.set_timesteps(steps)
        scheduler.alphas, scheduler.betas = alpha, alpha * _ratio(model.sde, times)
        scheduler.set_begin_index(0)
        z = scale[0] * x
        for i in range(steps):
            denoised, eps = model.predict(z / scale[i], times[i])
            velocity = scheduler.alphas[i] * eps - scheduler.betas[i] * denoised
            z = scheduler.step(velocity, scheduler.timesteps[i], z, return_dict=False)[0]
        return z / scale[-1]

    return solve


def _scheduler(kind: str, **options: Any) -> Any:
    return getattr(importlib.import_module("diffusers"), kind)(**options)


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Some schedulers cast their state to float32 inside a step; here that name means float64."""
    with mock.patch.object(torch, "float32", torch.float64):
        yield


def _always(value: Tensor) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: value


def _ratio(sde: SDE, times: Tensor) -> Tensor:
    return sde.sigma(times) / sde.alpha(times)


def _vp_alpha(sde: SDE, times: Tensor) -> Tensor:
    return torch.rsqrt(1 + _ratio(sde, times) ** 2)


def _vp_scale(sde: SDE, times: Tensor) -> Tensor:
    return _vp_alpha(sde, times) / sde.alpha(times)


# -- azula -----------------------------------------------------------------------------------------------------------


def azula(kind: str, **options: Any) -> Solver:
    """A sampler of azula on our denoiser and schedule, over given times; it would draw its noise itself."""

    def solve(model: ScoreModel, x: Tensor, times: Tensor, noise: Tensor | None = None) -> Tensor:
        library = importlib.import_module("azula.sample")
        posterior = importlib.import_module("azula.denoise").DiracPosterior
        base = getattr(library, kind)
        given = type(f"Given{kind}", (base,), {"timesteps": property(lambda self: times)})
        sampler = given(_AzulaDenoiser(model, posterior), silent=True, steps=times.numel() - 1, **options)
        draws = iter(()) if noise is None else iter(noise)
        fresh = lambda like: next(draws, torch.zeros_like(like))  # noqa: E731
        with mock.patch.object(torch, "randn_like", fresh):
            return sampler(x)

    return solve


class _AzulaDenoiser:
    """What an azula sampler asks of a denoiser: `schedule(t)` and a call with a posterior that has a mean."""

    def __init__(self, model: ScoreModel, posterior: type):
        self.model, self.posterior = model, posterior

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.sde.alpha(t), self.model.sde.sigma(t)

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        return self.posterior(self.model.denoise(x, t))


# -- all of them -----------------------------------------------------------------------------------------------------

_DPM = dict(vp=True, output="sample", final_sigmas_type="sigma_min")

PEERS: dict[str, Peer] = {
    "diffusers/ddpm-small": Peer("diffusers", diffusers_ddpm("fixed_small")),
    "diffusers/ddpm-large": Peer("diffusers", diffusers_ddpm("fixed_large")),
    "diffusers/ddim": Peer("diffusers", diffusers_ddim(), 1),
    "diffusers/ddim-half": Peer("diffusers", diffusers_ddim(0.5)),
    "diffusers/euler": Peer("diffusers", diffusers_ratio("EulerDiscreteScheduler", vp=False, output="epsilon"), 1),
    "diffusers/heun": Peer(
        "diffusers", diffusers_ratio("HeunDiscreteScheduler", vp=False, output="epsilon", stages="heun"), 2, nfe=2
    ),
    "diffusers/dpm++2m": Peer(
        "diffusers",
        diffusers_ratio("DPMSolverMultistepScheduler", solver_order=2, lower_order_final=False, **_DPM),
        2,
    ),
    "diffusers/dpm++2m-heun": Peer(
        "diffusers",
        diffusers_ratio(
            "DPMSolverMultistepScheduler", solver_order=2, solver_type="heun", lower_order_final=False, **_DPM
        ),
        2,
    ),
    # as it comes: the last step is of first order where there are fewer than 15
    "diffusers/dpm++2m-lower": Peer(
        "diffusers", diffusers_ratio("DPMSolverMultistepScheduler", solver_order=2, lower_order_final=True, **_DPM), 2
    ),
    "diffusers/dpm++3m": Peer(
        "diffusers",
        diffusers_ratio("DPMSolverMultistepScheduler", solver_order=3, lower_order_final=False, **_DPM),
        3,
    ),
    **{
        f"diffusers/sde-dpm++{order}m": Peer(
            "diffusers",
            diffusers_ratio(
                "DPMSolverMultistepScheduler",
                solver_order=order,
                algorithm_type="sde-dpmsolver++",
                noisy=True,
                lower_order_final=False,
                **_DPM,
            ),
        )
        for order in (2, 3)
    },
    "diffusers/dpm2": Peer(
        "diffusers", diffusers_ratio("KDPM2DiscreteScheduler", vp=False, output="epsilon", stages="middle"), 2, nfe=2
    ),
    "diffusers/dpm++2s": Peer(
        "diffusers",
        diffusers_ratio(
            "DPMSolverSinglestepScheduler", solver_order=2, stages="inserted", lower_order_final=False, **_DPM
        ),
        2,
        nfe=2,
    ),
    **{
        f"diffusers/unipc{order}{'' if kind == 'bh2' else '-' + kind}": Peer(
            "diffusers",
            diffusers_ratio(
                "UniPCMultistepScheduler", solver_order=order, solver_type=kind, lower_order_final=False, **_DPM
            ),
            order + 1,
        )
        for order in (2, 3)
        for kind in ("bh2", "bh1")
    },
    # as it comes: the order falls to one over the last steps
    "diffusers/unipc3-lower": Peer(
        "diffusers",
        diffusers_ratio("UniPCMultistepScheduler", solver_order=3, lower_order_final=True, **_DPM),
        4,
    ),
    **{
        f"diffusers/deis{order}": Peer(
            "diffusers",
            diffusers_ratio(
                "DEISMultistepScheduler", vp=True, output="epsilon", solver_order=order, lower_order_final=False
            ),
            order,
        )
        for order in (2, 3)
    },
    "diffusers/lms4": Peer("diffusers", diffusers_ratio("LMSDiscreteScheduler", vp=False, output="epsilon"), 4),
    "diffusers/ipndm": Peer("diffusers", diffusers_ipndm(), 4),
    "azula/ddpm": Peer("azula", azula("DDPMSampler")),
    "azula/ddim": Peer("azula", azula("DDIMSampler"), 1),
    "azula/ddim-quarter": Peer("azula", azula("DDIMSampler", eta=0.25)),
    "azula/euler": Peer("azula", azula("EulerSampler"), 1),
    "azula/heun": Peer("azula", azula("HeunSampler"), 2, nfe=2),
    **{
        f"azula/{kind.lower()}{order}": Peer("azula", azula(f"{kind}Sampler", order=order), order)
        for kind in ("zAB", "vAB", "zEAB", "xEAB", "REAB")
        for order in (2, 3)
    },
    "azula/zab4": Peer("azula", azula("zABSampler", order=4), 4),
}


# -- orders of convergence -------------------------------------------------------------------------------------------


def smooth_flow(seed: int = 0) -> tuple[ScoreModel, Tensor]:
    """A mixture wide enough for asymptotics within some hundred steps, and eight states at r = `SPAN[0]`."""
    angle = 2 * math.pi * torch.arange(3, dtype=torch.float64) / 3
    mixture = GaussianMixture.isotropic(torch.stack([angle.cos(), angle.sin()], 1), 0.5)
    model = mixture.diffuse(VESDE())
    clean = mixture.sample(8, seed=seed)
    z = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return model, clean + SPAN[0] * z


SPAN = (4.0, 0.25)
"""r = sigma/alpha at both ends of the flow that orders are measured on."""


def graded_times(sde: SDE, steps: int) -> Tensor:
    """`steps` equal steps in log r over `SPAN`, the first cut into halves so often that the start of a multistep
    method, at first order, is exact beside the rest."""
    high, low = (math.log(r) for r in SPAN)
    h = (high - low) / steps
    halvings = 2 * math.ceil(math.log2(steps))
    cuts = [0.0] + [h * 0.5**k for k in range(halvings, -1, -1)] + [h * k for k in range(2, steps + 1)]
    return sde.time(-2 * (high - torch.tensor(cuts, dtype=torch.float64)))


def exact_flow(model: ScoreModel, x: Tensor) -> Tensor:
    """The probability flow from r = SPAN[0] to SPAN[1], to about twelve digits."""

    def slope(log_r: float, y: np.ndarray) -> np.ndarray:
        t = model.sde.time(torch.tensor(-2 * log_r, dtype=torch.float64))
        state = torch.from_numpy(y).reshape(x.shape) * model.sde.alpha(t)
        return (math.exp(log_r) * model.noise(state, t)).flatten().numpy()

    ends = [model.sde.time(torch.tensor(-2 * math.log(r), dtype=torch.float64)) for r in SPAN]
    start = (x / model.sde.alpha(ends[0])).flatten().numpy()
    found = solve_ivp(slope, [math.log(r) for r in SPAN], start, method="DOP853", rtol=1e-13, atol=1e-13)
    return torch.from_numpy(found.y[:, -1]).reshape(x.shape) * model.sde.alpha(ends[1])


def convergence(solve: Solver, steps: Sequence[int] = (64, 128, 256)) -> tuple[float, list[float]]:
    """The order that the largest errors of a deterministic solver show over `steps`, and these errors."""
    model, x = smooth_flow()
    exact = exact_flow(model, x)
    errors = []
    for n in steps:
        errors.append(float((solve(model, x, graded_times(model.sde, n), None) - exact).abs().max()))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    return -float(slope), errors


# -- reference numbers -----------------------------------------------------------------------------------------------


def paths(sde: SDE) -> dict[str, Tensor]:
    """Two grids of twelve steps: down to t_min, and in equal ratios down to r = 0.3, where the components still mix."""
    start = float(sde.log_snr(torch.tensor(sde.t_max, dtype=torch.float64)))
    half = sde.time(torch.linspace(start, -2 * math.log(0.3), 13, dtype=torch.float64))
    half[0] = sde.t_max
    return {"whole": karras(sde, 12), "half": half}


def reference(mixture: GaussianMixture) -> dict[str, Any]:
    """Starts, noise, times and where every installed peer ends, for VP, VE and EDM."""
    g = torch.Generator().manual_seed(5)
    starts = torch.randn((8, 2), generator=g, dtype=torch.float64)
    noise = torch.randn((12, 8, 2), generator=g, dtype=torch.float64)
    cases = []
    for sde in (VPSDE(), VESDE(), EDMSDE()):
        model = mixture.diffuse(sde)
        for path, times in paths(sde).items():
            ends = {
                name: peer.solve(model, sde.prior_std * starts, times, noise).tolist()
                for name, peer in PEERS.items()
                if peer.installed
            }
            cases.append({"sde": type(sde).__name__, "path": path, "times": times.tolist(), "ends": ends})
    return {
        "about": "x at the end of each path, from prior_std * starts at its first time; written by benchmarks/peers.py",
        "problem": "ring8: eight components of standard deviation 0.07 on the unit circle",
        "versions": versions(),
        "starts": starts.tolist(),
        "noise": noise.tolist(),
        "cases": cases,
    }


def versions() -> dict[str, str]:
    """Versions of torch and of the peers that are installed."""
    libraries = dict.fromkeys(peer.library for peer in PEERS.values() if peer.installed)
    return {name: importlib.metadata.version(name) for name in ("torch", *libraries)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew the reference numbers of the tests")
    parser.add_argument("--out", type=Path, default=REFERENCE)
    args = parser.parse_args()
    print(" ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"{'peer':26s} {'NFE/step':>8s} {'stated':>7s} {'found':>6s}  errors at 64, 128, 256 steps")
    for name, peer in PEERS.items():
        if not peer.installed:
            print(f"{name:26s} not installed")
        elif peer.order is not None:
            found, errors = convergence(peer.solve)
            print(
                f"{name:26s} {peer.nfe:8d} {peer.order:7d} {found:6.2f}  {' '.join(f'{e:.1e}' for e in errors)}",
                flush=True,
            )
    if args.write:
        from problems import PROBLEMS

        from scoresde.store import write_json

        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, reference(GaussianMixture(*PROBLEMS["ring8"]())))
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
