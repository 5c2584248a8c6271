r"""Exact likelihoods by other people's solvers, on any `ScoreModel`: the same model, points, probes and ends for all.

    python benchmarks/likelihood_peers.py       # which libraries are there, and each one against closed form

Every peer is `log_prob(model, x, tolerance, probes) -> (B,)` nats: it solves the probability flow in t from t_min to 1
together with the log density (Song et al. 2021, equations 13 and 39; Chen et al. 2018, theorem 1), with rtol = atol =
`tolerance`, and adds the model's own density at t = 1. `probes` (B, k, *) are the random directions of the trace estimate,
fixed for the solve; None asks for the exact trace by d vector-Jacobian products. For Rademacher probes such an estimate is
the same number in all coordinates, so solvers on different paths can be held to one truth (`solve_truth`). `Meter` counts
what a solve asked of a model, whoever the solver is.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from likelihood_truth import signs, solve_truth, units
from torch import Tensor

from scoresde import VPSDE, DiffusedMixture, GaussianMixture, ScoreModel
from scoresde.sde import expand

LogDensity = Callable[[ScoreModel, Tensor, float, "Tensor | None"], Tensor]
"""(model, x (B, *), tolerance, probes (B, k, *) or None for the exact trace) -> (B,) nats."""


@dataclass(frozen=True)
class Peer:
    """One way to a likelihood: the library it needs, whether it can take an exact trace, the most probes of one solve."""

    library: str
    log_prob: LogDensity
    exact: bool = True
    most_probes: int | None = None

    @property
    def installed(self) -> bool:
        """Whether the library can be imported here."""
        try:
            importlib.import_module(self.library)
        except ImportError:
            return False
        return True


# -- what a solve asks of a model ------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Evaluations and vector-Jacobian products, in rows (examples) and in calls."""

    forward_rows: int = 0
    forward_calls: int = 0
    vjp_rows: int = 0
    vjp_calls: int = 0

    def watch(self, x: Tensor) -> Tensor:
        """Count an evaluation at x, and every pass backwards through what is returned in its place."""
        rows = x.shape[0]
        self.forward_rows, self.forward_calls = self.forward_rows + rows, self.forward_calls + 1
        if (
            torch.autograd.forward_ad.unpack_dual(x).tangent is not None
        ):  # forward mode: a product with every evaluation
            self.vjp_rows, self.vjp_calls = self.vjp_rows + rows, self.vjp_calls + 1
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x
        seen = x.view_as(x)

        def back(_: Tensor) -> None:
            self.vjp_rows, self.vjp_calls = self.vjp_rows + rows, self.vjp_calls + 1

        seen.register_hook(back)
        return seen

    @contextlib.contextmanager
    def on(self, model: ScoreModel) -> Iterator[Meter]:
        """Counts what happens to `model` inside: calls of its network, or of a mixture's one pass over its components."""
        if isinstance(model, DiffusedMixture):
            answer = model._answer
            with mock.patch.object(model, "_answer", lambda x, *args, **kwargs: answer(self.watch(x), *args, **kwargs)):
                yield self
            return
        handle = model.net.register_forward_pre_hook(lambda _, args: (self.watch(args[0]), *args[1:]))
        try:
            yield self
        finally:
            handle.remove()


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    clock = time.process_time()
    work()
    return time.process_time() - clock


# -- the flow in t, as one writes it out -----------------------------------------------------------------------------


def flow_and_trace(model: ScoreModel, x: Tensor, t: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """(v, trace): dx/dt and tr(dv/dx) (B,) or its estimate, from one forward pass that all products share."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        v = model.velocity(leaf, t.clamp(model.sde.t_min, 1.0))
    trace = torch.zeros(x.shape[0], dtype=x.dtype)
    directions = units(x) if probes is None else probes.unbind(1)
    for i, z in enumerate(directions):
        row = torch.autograd.grad(v, leaf, z, retain_graph=i + 1 < len(directions))[0]
        trace += (row * z).flatten(1).sum(1)
    return v.detach(), trace if probes is None else trace / len(directions)


def score_sde(model: ScoreModel, x: Tensor, tolerance: float, probes: Tensor | None) -> Tensor:
    """As score_sde_pytorch publishes it (Song et al. 2021, appendix D.2; its likelihood.py).

    SciPy's RK45 on the whole batch as one vector, which visits NumPy at every evaluation; the drift f x - g^2 s / 2 from
    a forward pass without a graph, and again from one with a graph for the product with its single probe.
    """
    integrate = importlib.import_module("scipy.integrate")
    if probes is None or probes.shape[1] != 1:
        raise ValueError("the published code takes one probe.")
    z, n = probes[:, 0], x.shape[0]

    def drift(state: Tensor, t: Tensor) -> Tensor:
        f, g = model.sde.drift_scale(t), model.sde.diffusion(t)
        return expand(f, state) * state - 0.5 * expand(g**2, state) * model.score(state, t)

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat[:-n]).reshape(x.shape).to(x.dtype)
        times = torch.full((n,), t, dtype=torch.float64)
        with torch.no_grad():
            velocity = drift(state, times)
        with torch.enable_grad():
            leaf = state.detach().requires_grad_(True)
            gradient = torch.autograd.grad((drift(leaf, times) * z).sum(), leaf)[0]
        rate = (gradient * z).flatten(1).sum(1)
        return np.concatenate([velocity.double().numpy().reshape(-1), rate.double().numpy()])

    start = np.concatenate([x.double().numpy().reshape(-1), np.zeros(n)])
    found = integrate.solve_ivp(slope, (model.sde.t_min, 1.0), start, method="RK45", rtol=tolerance, atol=tolerance).y[
        :, -1
    ]
    end = torch.from_numpy(found[:-n]).reshape(x.shape).to(x.dtype)
    return model.terminal_log_prob(end) + torch.from_numpy(found[-n:])


def torchdiffeq(method: str) -> LogDensity:
    """`odeint` on the pair (x, log density), all examples with one step; told to stop at t = 1 (`step_t`)."""

    def log_prob(model: ScoreModel, x: Tensor, tolerance: float, probes: Tensor | None) -> Tensor:
        odeint = importlib.import_module("torchdiffeq").odeint

        def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return flow_and_trace(model, state[0], t.expand(x.shape[0]), probes)

        ends = torch.tensor([model.sde.t_min, 1.0], dtype=torch.float64)
        start = (x, torch.zeros(x.shape[0], dtype=x.dtype))
        with torch.no_grad():
            states, change = odeint(
                slope, start, ends, rtol=tolerance, atol=tolerance, method=method, options={"step_t": ends[1:]}
            )
        return model.terminal_log_prob(states[-1]) + change[-1].double()

    return log_prob


def torchode(kind: str) -> LogDensity:
    """`AutoDiffAdjoint` on x and log density side by side: own steps for every example, all evaluated until the last is done."""

    def log_prob(model: ScoreModel, x: Tensor, tolerance: float, probes: Tensor | None) -> Tensor:
        library = importlib.import_module("torchode")

        def slope(t: Tensor, state: Tensor) -> Tensor:
            v, trace = flow_and_trace(model, state[:, :-1].reshape(x.shape), t, probes)
            return torch.cat([v.flatten(1), trace[:, None]], 1)

        term = library.ODETerm(slope)
        controller = library.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        solver = library.AutoDiffAdjoint(getattr(library, kind)(term=term), controller)
        ends = (torch.full((x.shape[0],), t, dtype=torch.float64) for t in (model.sde.t_min, 1.0))
        start = torch.cat([x.flatten(1), torch.zeros(x.shape[0], 1, dtype=x.dtype)], 1)
        with torch.no_grad():
            found = solver.solve(library.InitialValueProblem(start, *ends))
        if bool((found.status != 0).any()):
            raise RuntimeError(f"torchode stopped with status {found.status.unique().tolist()}.")
        end = found.ys[:, -1]
        return model.terminal_log_prob(end[:, :-1].reshape(x.shape)) + end[:, -1].double()

    return log_prob


def flow_matching(method: str) -> LogDensity:
    """`ODESolver.compute_likelihood`, whose time s runs from noise (0) to data (1): t = t_min + (1 - s)(1 - t_min)."""

    def log_prob(model: ScoreModel, x: Tensor, tolerance: float, probes: Tensor | None) -> Tensor:
        solver = importlib.import_module("flow_matching.solver").ODESolver
        wrapper = importlib.import_module("flow_matching.utils").ModelWrapper
        if probes is not None and probes.shape[1] != 1:
            raise ValueError("flow_matching takes one probe.")
        span = 1.0 - model.sde.t_min

        class Velocity(wrapper):
            def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
                times = (model.sde.t_min + (1.0 - t.double()) * span).clamp(model.sde.t_min, 1.0)  # it looks past s = 0
                return -span * self.model.velocity(x, times.expand(x.shape[0]))

        # it draws its probe without a seed and keeps the signs, turned around
        given = (
            contextlib.nullcontext()
            if probes is None
            else mock.patch.object(torch, "randn_like", return_value=-probes[:, 0])
        )
        with _default_dtype(x.dtype), given:
            _, value = solver(Velocity(model)).compute_likelihood(
                x_1=x.clone(),
                log_p0=model.terminal_log_prob,
                step_size=None,
                method=method,
                rtol=tolerance,
                atol=tolerance,
                exact_divergence=probes is None,
            )
        return value.double()

    return log_prob


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Its probe comes in the default dtype, and is refused beside float64 examples."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


PEERS: dict[str, Peer] = {
    "score_sde": Peer("scipy", score_sde, exact=False, most_probes=1),
    "torchdiffeq/dopri5": Peer("torchdiffeq", torchdiffeq("dopri5")),
    "torchode/dopri5": Peer("torchode", torchode("Dopri5")),
    "torchode/tsit5": Peer("torchode", torchode("Tsit5")),
    "flow_matching/dopri5": Peer("flow_matching", flow_matching("dopri5"), most_probes=1),
}


def versions() -> dict[str, str]:
    """Versions of torch and of the peers that are installed."""
    libraries = dict.fromkeys(peer.library for peer in PEERS.values() if peer.installed)
    return {name: importlib.metadata.version(name) for name in ("torch", *libraries)}


def main() -> None:
    """Exact traces against closed form on a ring, and a single probe against its own exact value."""
    from problems import PROBLEMS

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    mixture = GaussianMixture(*PROBLEMS["ring8"]())
    model = mixture.diffuse(VPSDE())
    x = mixture.sample(64, seed=5)
    truth, probe = model.log_prob(x, model.sde.t_min), signs(tuple(x.shape), 1, 0, x.dtype)
    print(" ".join(f"{name} {number}" for name, number in versions().items()))
    whole = solve_truth(model, x, panels=24)
    print(f"solve_truth against closed form: {float((whole.log_prob() - truth).abs().max()):.1e} nats at most")
    print(f"{'peer':22s} {'trace':>6s} {'max error, nats':>16s} {'forwards':>9s} {'products':>9s}")
    for name, peer in PEERS.items():
        if not peer.installed:
            print(f"{name:22s} not installed: pip install {peer.library}")
            continue
        for kind, probes, goal in (("exact", None, truth), ("probe", probe, whole.log_prob(probe))):
            if probes is None and not peer.exact:
                continue
            with Meter().on(model) as meter:
                error = (peer.log_prob(model, x, 1e-7, probes) - goal).abs().max()
            forwards, products = meter.forward_rows / len(x), meter.vjp_rows / len(x)
            print(f"{name:22s} {kind:>6s} {float(error):16.1e} {forwards:9.1f} {products:9.1f}", flush=True)


if __name__ == "__main__":
    main()
