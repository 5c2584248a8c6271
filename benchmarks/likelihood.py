r"""Exact likelihoods, error against cost: ours beside those of other libraries, in one run.

    python benchmarks/likelihood.py --mlp runs/mlp --digits runs/plain/model --cache runs/truth.npz    # whole tables
    python benchmarks/likelihood.py --quick                                             # a minute; nothing is written

Error is in nats, cost in F: CPU time over that of one bare forward pass of the same batch (no graph, one thread). The
methods take turns, each followed by bare passes, and a cost is the median over rounds, so that a machine that slows
down slows both. Forward passes and vector-Jacobian products are counted as well, per example. Problems:

* exact 2D mixtures under VP in float64, exact trace; the truth is their closed form;
* a perceptron trained on moons (--mlp, or trained here), exact trace; the truth is its own flow in float64;
* U-Nets trained on digits (--digits), 64 dimensions, points dequantized from test images. "Solver error" is against the
  exact value for the very probes that a solve was given, so that all of it is the solver's; "total error" is against the
  exact trace, root mean square over points and rounds (every round has its own probes).

A peer that knows no exact trace runs with one probe on all problems, and is held to that probe's exact value. Methods
sweep their tolerance. What a target costs is read at the tolerance where the mean error of other points, the pilots, meets
it (log-log interpolation), and the error there is the scored points'. For the total error, tolerances are those where
pilots have a solver error of 0.1 nats RMS; where one solve misses the target, it is repeated with other probes as often as its
scatter demands.

Memory is the peak of resident memory (VmHWM, reset before the call) over what the process held before, in a process of its
own: this is what a machine must have; torch's allocations on the CPU escape tracemalloc, and its profiler sees them
only by slowing every operation down.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from likelihood_ours import ESTIMATED, ESTIMATES, OURS, ours
from likelihood_peers import PEERS, Meter, seconds, versions
from likelihood_truth import Case, digits_case, mixture_case, mlp_case, signs, trained_mlp
from problems import PROBLEMS
from torch import Tensor

from scoresde import Exact, load, log_prob, sample
from scoresde.store import save_model, write_json

RESULTS = Path(__file__).parent / "results"

PEER_ESTIMATES = {"torchdiffeq/dopri5": {"16 probes": 16, "exact": None}}

TARGETS = {"2d": (1e-3, 1e-4), "digits": (1e-2, 1e-3)}
TOLERANCES = {"2d": [10.0**-k for k in range(1, 9)], "digits": [10.0**-k for k in range(1, 7)]}
TOTAL, SHARE = 0.25, 0.1  # nats: the target of the total error, and the solver's part of it
MOST = 3000.0  # F: tolerances beyond this cost are not tried


@dataclass
class Job:
    """One solve to be repeated. `run(x, probes, seed)` -> values (B,) and their reported standard errors or None.

    `trace`: "exact", "1 probe" and so on; `probes`, how many are given (None: exact; 0: the method draws its own).
    """

    method: str
    trace: str
    tolerance: float
    run: Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor | None]]
    probes: int | None
    rounds: int
    costs: list[float] = field(default_factory=list)
    solver: list[Tensor] = field(default_factory=list)
    total: list[Tensor] = field(default_factory=list)
    stderr: list[Tensor] = field(default_factory=list)
    asked: tuple[float, float] = (math.nan, math.nan)
    note: str = ""

    def row(self) -> dict[str, Any]:
        """Means over rounds and points; infinite where an example did not finish."""
        row = {"method": self.method, "trace": self.trace, "tolerance": self.tolerance}
        if self.note:
            return row | {"note": self.note}
        row |= dict(forwards=self.asked[0], vjps=self.asked[1], cost=float(np.median(self.costs)))
        total = torch.stack(self.total)
        row["total_rms"] = _finite(total.square().mean().sqrt())
        if self.solver:
            error = torch.stack(self.solver).abs()
            row |= dict(mean_error=_finite(error.mean()), max_error=_finite(error.max()))
            row["solver_rms"] = _finite(error.square().mean().sqrt())
        if self.stderr:
            row["stderr"] = _finite(torch.stack(self.stderr).square().mean().sqrt())
        return row


def _finite(value: Tensor) -> float:
    return float(f"{float(value):.4g}") if bool(torch.isfinite(value)) else math.inf


def theirs(case: Case, name: str, tolerance: float) -> Callable[..., Any]:
    return lambda x, probes, seed: (PEERS[name].log_prob(case.model, x, tolerance, probes), None)


def sweep(case: Case, name: str, tolerances: list[float], rounds: int) -> list[Job]:
    """One method at several tolerances: an exact trace in 2D where it has one, one given probe otherwise."""
    peer = PEERS.get(name)
    probes = 1 if case.kind == "digits" or (peer and not peer.exact) else None
    build = theirs if peer else ours
    trace = "exact" if probes is None else "1 probe"
    return [Job(name, trace, t, build(case, name, t), probes, rounds) for t in tolerances]


def measure(case: Case, jobs: list[Job], seconds_of_bare: float = 0.1) -> None:
    """All jobs in turns, every round with its own probes; jobs that fail keep a note."""
    x, model = case.x, case.model
    times = torch.full((len(x),), 0.5, dtype=torch.float64)

    @torch.no_grad()
    def bare(passes: int) -> float:
        return seconds(lambda: [model.output(x, times) for _ in range(passes)]) / passes

    passes = max(3, round(seconds_of_bare / bare(3)))
    for k in range(max((job.rounds for job in jobs), default=0)):
        for job in (job for job in jobs if k < job.rounds and not job.note):
            probes = signs(tuple(x.shape), job.probes, 1000 + k, x.dtype) if job.probes else None
            found: list[tuple[Tensor, Tensor | None]] = []
            before = bare(passes)
            try:
                with Meter().on(model) as meter, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    spent = seconds(lambda: found.append(job.run(x, probes, k)))  # noqa: B023
            except (ValueError, RuntimeError, ArithmeticError, AssertionError) as e:
                job.note = f"{type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''}"
                continue
            value, stderr = found[0]
            job.costs.append(2 * spent / (before + bare(passes)))
            job.asked = (meter.forward_rows / len(x), meter.vjp_rows / len(x))
            job.total.append(value - case.goal(None))
            if job.probes != 0:
                job.solver.append(value - case.goal(probes))
            if stderr is not None:
                job.stderr.append(stderr)


def pilot_rows(case: Case, name: str, tolerances: list[float]) -> list[dict[str, Any]]:
    """A method on the pilots, from loose to tight, until it is far below every target or too dear."""
    rows: list[dict[str, Any]] = []
    for tolerance in tolerances:
        jobs = sweep(case.pilot, name, [tolerance], 1)
        measure(case.pilot, jobs, 0.02)
        rows.append(jobs[0].row())
        if "note" not in rows[-1] and (rows[-1]["mean_error"] < TARGETS[case.kind][-1] / 4 or rows[-1]["cost"] > MOST):
            break
    return rows


def tolerance_for(pilots: list[dict[str, Any]], target: float, column: str = "mean_error") -> float | None:
    """Where the pilots' error first meets the target, log-log between tolerances; None if it never does."""
    usable = [row for row in pilots if math.isfinite(row.get(column, math.inf))]
    for i, row in enumerate(usable):
        if row[column] <= target:
            if i == 0:
                return row["tolerance"]
            pair = usable[i - 1 : i + 1]
            errors, tolerances = ([math.log(r[key]) for r in reversed(pair)] for key in (column, "tolerance"))
            return math.exp(np.interp(math.log(target), errors, tolerances))
    return None


def read_at(rows: list[dict[str, Any]], tolerance: float, key: str) -> float:
    """A column of a sweep at a tolerance between its own, log-log."""
    usable = sorted((row for row in rows if math.isfinite(row.get(key, math.inf))), key=lambda row: row["tolerance"])
    at, values = ([math.log(row[name]) for row in usable] for name in ("tolerance", key))
    return math.exp(np.interp(math.log(tolerance), at, values)) if usable else math.nan


def at_targets(pilots: list[dict[str, Any]], rows: list[dict[str, Any]], targets: tuple[float, ...]) -> dict[str, Any]:
    found = {}
    for target in targets:
        t = tolerance_for(pilots, target)
        found[f"{target:g}"] = t and {
            "tolerance": t,
            **{key: read_at(rows, t, key) for key in ("cost", "mean_error", "max_error", "forwards", "vjps")},
        }
    return found


def total_rows(case: Case, pilots: dict[str, list], rows: dict[str, list], rounds: int) -> list[dict[str, Any]]:
    """Total error at the tolerance where pilots have a solver error of `SHARE`, and the cost of one of `TOTAL` nats."""
    jobs = []
    for name in rows:
        t = tolerance_for(pilots[name], SHARE, "solver_rms")
        if t is None:
            continue
        if name in PEERS:
            jobs += [Job(name, "1 probe", t, theirs(case, name, t), 1, rounds)]
            for trace, k in PEER_ESTIMATES.get(name, {}).items():
                jobs.append(Job(name, trace, t, theirs(case, name, t), k, 1 if k is None else rounds))
        else:
            jobs += [Job(name, "1 probe", t, ours(case, name, t), 1, rounds)]
            for trace, make in ESTIMATES.items() if name in ESTIMATED else ():
                probes, times = (None, 1) if make is Exact else (0, rounds)
                jobs.append(Job(name, trace, t, ours(case, name, t, make), probes, times))
    measure(case, jobs)
    found = []
    for row in (job.row() for job in jobs):
        if "note" not in row:
            solver = row.get("solver_rms", read_at(rows[row["method"]], row["tolerance"], "solver_rms"))
            scatter = max(row["total_rms"] ** 2 - solver**2, 0.0)
            row["repeats"] = max(1.0, scatter / (TOTAL**2 - solver**2)) if solver < TOTAL else math.inf
            row["cost_at_total"] = row["cost"] * row["repeats"]
        found.append(row)
    return found


def run_case(case: Case, names: list[str], rounds: int, tolerances: list[float]) -> dict[str, Any]:
    """Pilots, sweep, targets and, on digits, the total error."""
    pilots = {name: pilot_rows(case, name, tolerances) for name in names}
    print(f"{case.name}: {sum(map(len, pilots.values()))} tolerances to score", flush=True)
    jobs = {name: sweep(case, name, [row["tolerance"] for row in pilots[name]], rounds) for name in names}
    measure(case, [job for many in jobs.values() for job in many])
    rows = {name: [job.row() for job in many] for name, many in jobs.items()}
    result = {
        "kind": case.kind,
        "points": len(case.x),
        "pilots": len(case.pilot.x),
        "truth_check": case.check,
        "rows": rows,
        "targets": {name: at_targets(pilots[name], rows[name], TARGETS[case.kind]) for name in names},
        "pilot_rows": pilots,
        "one_probe_std": float(case.truth.probe_variance().mean().sqrt()),
    }
    if case.kind == "digits":
        result["total"] = total_rows(case, pilots, rows, rounds)
    return result


# -- tables and the plot -----------------------------------------------------------------------------------------------


def show(name: str, result: dict[str, Any]) -> None:
    print(
        f"\n{name}: {result['points']} points, truth to {result['truth_check']:.1e} nats; one probe scatters by "
        f"{result['one_probe_std']:.2f} nats"
    )
    columns = f"{'tolerance':>9s} {'forwards':>8s} {'vjps':>7s} {'F':>7s} {'mean':>8s} {'max':>8s}"
    print(f"{'method':22s} {'trace':>8s} {columns}")
    for method, rows in result["rows"].items():
        for row in rows:
            head = f"{method:22s} {row['trace']:>8s} {row['tolerance']:9.0e} "
            if "note" in row:
                print(head + row["note"])
                continue
            print(
                head + f"{row['forwards']:8.1f} {row['vjps']:7.1f} {row['cost']:7.1f} {row['mean_error']:8.1e} "
                f"{row['max_error']:8.1e}"
            )
    for target in next(iter(result["targets"].values())):
        print(f"mean error {target} nats (tolerance from pilots): F, forwards, vjps, scored mean and maximum error")
        for method, found in result["targets"].items():
            at = found[target]
            print(
                f"  {method:22s} "
                + (
                    f"{at['cost']:7.1f} {at['forwards']:7.1f} {at['vjps']:7.1f} {at['mean_error']:8.1e} {at['max_error']:8.1e}"
                    f" at {at['tolerance']:.1e}"
                    if at
                    else "not reached"
                )
            )
    if "total" in result:
        print(f"total error: RMS, reported standard error, cost of one solve, and of {TOTAL} nats by repeating it")
        for row in result["total"]:
            head = f"  {row['method']:22s} {row['trace']:>12s} {row['tolerance']:9.1e} "
            said = f"{row['stderr']:8.3f}" if "stderr" in row else f"{'-':>8s}"
            if "note" in row:
                print(head + row["note"])
            else:
                print(head + f"{row['total_rms']:8.3f} {said} {row['cost']:8.1f} {row['cost_at_total']:9.0f}")
    sys.stdout.flush()


# Okabe & Ito's palette: ours warm, solid and thick, peers cold, dashed and thin
WARM = [("#D55E00", "o"), ("#E69F00", "s"), ("#CC79A7", "^"), ("#F0E442", "P")]
COLD = [("#000000", "D"), ("#0072B2", "v"), ("#56B4E9", "<"), ("#009E73", ">"), ("#999999", "X")]


def draw(results: dict[str, Any], path: Path) -> None:
    """Mean error against cost, one panel per problem, and total error where there is one; axes logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from scoresde.plots import save
    from scoresde.plots.style import new_figure

    panels = [(name, "rows") for name in results] + [(name, "total") for name, r in results.items() if "total" in r]
    columns = min(3, len(panels))
    figure = new_figure(4.6 * columns, 3.7 * math.ceil(len(panels) / columns) + 0.5)
    style = {name: (*WARM[i % len(WARM)], "-", 2.6 if i == 0 else 1.8, 5) for i, name in enumerate(OURS)}
    style |= {name: (*COLD[i % len(COLD)], "--", 1.2, 1) for i, name in enumerate(PEERS)}
    handles: dict[str, Any] = {}
    for i, (problem, key) in enumerate(panels):
        ax = figure.add_subplot(math.ceil(len(panels) / columns), columns, i + 1)
        result = results[problem]
        for method, (colour, marker, line, width, order) in style.items():
            label = f"{method} (scoresde)" if method in OURS else method
            label += " (1 probe)" if method in PEERS and not PEERS[method].exact else ""
            look = dict(color=colour, marker=marker, ms=6 if method in OURS else 4.5, lw=width, zorder=2 + order)
            if key == "rows":
                rows = [r for r in result["rows"].get(method, []) if math.isfinite(r.get("mean_error", math.inf))]
                if rows:
                    xs, ys = [r["cost"] for r in rows], [max(r["mean_error"], 1e-12) for r in rows]
                    handles[label] = ax.plot(xs, ys, ls=line, label=label, **look)[0]
            else:
                for j, r in enumerate(r for r in result["total"] if r["method"] == method and "note" not in r):
                    at = (r["cost"], r["total_rms"])
                    ax.plot(*at, ls="", **look)
                    if r["trace"] != "1 probe":
                        ax.annotate(r["trace"], at, (6, -9 if j % 2 else 4), textcoords="offset points", fontsize=7)
        if key == "total":
            ax.axhline(TOTAL, color="#666666", lw=0.8, ls=":")
        ax.set(xscale="log", yscale="log", title=problem if key == "rows" else f"{problem}: total error of one solve")
        ax.margins(x=0.12)
        for axis in (ax.xaxis, ax.yaxis) if key == "total" else (ax.xaxis,):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("cost of a likelihood, F (bare forward passes)", fontsize=9)
        ax.set_ylabel("mean solver error, nats" if key == "rows" else "RMS error, nats", fontsize=9)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


# -- memory ----------------------------------------------------------------------------------------------------------


def memory_child(path: str, task: str, batch: int) -> None:
    """Print the MiB that one call adds at its peak."""
    model = load(path).eval().requires_grad_(False)
    flat = len(model.event_shape or (2,)) == 1

    def run(n: int) -> None:
        x = torch.rand((n, *(model.event_shape or (2,))), generator=torch.Generator().manual_seed(0)) * 2 - 1
        kind, name = task.split(" ")
        if kind == "sample":
            sample(model, tuple(x.shape), method=name, steps=10, seed=0)
        elif kind == "log_prob":
            log_prob(model, x, divergence=Exact() if flat else None, rtol=1e-2, atol=1e-2, seed=0, **OURS[name])
        else:
            exact = flat and PEERS[name].exact
            PEERS[name].log_prob(model, x, 1e-2, None if exact else signs(tuple(x.shape), 1, 0, x.dtype))

    warnings.simplefilter("ignore")
    run(2)  # what is loaded on first use is nobody's peak
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run(batch)
    print((_resident("VmHWM") - before) / 1024)


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def memory(models: dict[str, Path], names: list[str]) -> dict[str, Any]:
    """MiB at the peak by problem and task, each in a process of its own."""
    found: dict[str, Any] = {}
    for problem, path in models.items():
        batch = 8192 if problem == "moons-mlp" else 256
        found[problem] = {"batch": batch}
        print(f"\n{problem}: MiB at the peak, batch {batch}, beyond what the process held")
        for task in ["sample ddim", "sample auto"] + [f"{'peer' if n in PEERS else 'log_prob'} {n}" for n in names]:
            command = [sys.executable, __file__, "--memory-child", str(path), task, str(batch)]
            done = subprocess.run(command, capture_output=True, text=True)
            found[problem][task] = float(done.stdout.split()[-1]) if done.returncode == 0 else None
            print(f"  {task:28s} {found[problem][task] if done.returncode == 0 else done.stderr[-200:]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", nargs="*", default=["ring8", "moons", "grid25"], choices=list(PROBLEMS))
    parser.add_argument("--mlp", type=Path, help="a trained 2D model's folder; one is trained here without it")
    parser.add_argument(
        "--perceptron", action=argparse.BooleanOptionalAction, default=True, help="the 2D network at all"
    )
    parser.add_argument("--digits", type=Path, nargs="*", default=[], help="folders of models trained on digits")
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--points", type=int, default=512, help="in 2D")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--panels", type=int, default=16, help="of eight nodes, for the truth on digits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="an .npz for the truths of networks")
    parser.add_argument("--quick", action="store_true", help="one mixture and a hasty network, nothing written")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory-child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "likelihood.json", help="problems already there are kept"
    )
    parser.add_argument("--plot", type=Path, default=RESULTS / "likelihood.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_child:
        memory_child(args.memory_child[0], args.memory_child[1], int(args.memory_child[2]))
        return
    if args.quick:
        args.mixtures, args.points, args.images, args.panels, args.rounds, args.memory = ["ring8"], 64, 4, 8, 1, False
    names = [name for name in args.methods if name in OURS or PEERS[name].installed]
    for name in (name for name in args.methods if name not in names):
        print(f"{name} is left out: not installed (pip install {PEERS[name].library})")
    results: dict[str, Any] = {}
    if args.json.exists() and not args.quick:
        results = json.loads(args.json.read_text())
    results |= {"versions": versions(), "rounds": args.rounds, "absent": [n for n in args.methods if n not in names]}
    with tempfile.TemporaryDirectory() as folder:
        if args.perceptron and args.mlp is None:
            args.mlp = save_model(trained_mlp(300 if args.quick else 6000), Path(folder))
        cases: list[tuple[Callable[[], Case], Path | None]] = [
            (partial(mixture_case, name, args.points), None) for name in args.mixtures
        ]
        if args.perceptron:
            panels = 8 if args.quick else 24
            cases.append((lambda: mlp_case(load(args.mlp), args.points, panels, args.cache), args.mlp))
        for path in args.digits:
            cases.append((partial(digits_case, path, args.images, args.panels, args.cache), path))
        models: dict[str, Path] = {}
        for make, path in cases:
            case = make()
            if path is not None:
                models[case.name] = path
            results.setdefault("problems", {})[case.name] = run_case(
                case, names, args.rounds, TOLERANCES[case.kind][: 4 if args.quick else None]
            )
            show(case.name, results["problems"][case.name])
            if not args.quick:
                write_json(args.json, results)
        if args.memory:
            results["memory"] = results.get("memory", {}) | memory(models, names)
    if not args.quick:
        write_json(args.json, results)
        draw(results["problems"], args.plot)
        print(f"written to {args.json} and {args.plot}")


if __name__ == "__main__":
    main()
