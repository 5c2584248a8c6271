r"""How far deterministic samplers are from the exact end of the probability flow, at a given number of evaluations.

    python benchmarks/samplers.py                          # the whole table and the plot (with diffusers and azula)
    python benchmarks/samplers.py --quick                  # one process, two problems, no tuning; nothing is written
    python benchmarks/samplers.py --grids --sde VP VP-1e-5 VE EDM --nfe 10 20     # which default grid suits which method
    python benchmarks/samplers.py --only auto dpm++2m                             # new rows of some of ours in the stored table
    python benchmarks/samplers.py --digits runs/digits/model                      # a trained network in place of mixtures

Models are exact mixtures in float64, so all of the error is the sampler's. Every method has the same starts
x_1 = prior_std * noise, and ends at t_min without a final denoiser; the error is that of y = x/alpha(t_min) against the
probability flow solved to 1e-10 from the same start. Per problem: the root mean square over starts and dimensions, which
the few starts close to where trajectories part dominate, and the median over starts of the root mean square over
dimensions. Tables hold the geometric mean over problems. Evaluations are counted by the model itself: a method with
several evaluations a step takes as many steps as the budget holds.

Methods of both sides run on the same three grids (equal steps in sigma/alpha^(1/7), in log-SNR and in t), ours on their default
one as well, and the best grid is reported for each; "auto" has its own. Tuned samplers are learned on starts that are not scored.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from endpoints import SCORED, TUNING, Case, check_reference, errors, flow_end, generator
from peers import _DPM, PEERS, Peer, diffusers_ratio, versions
from problems import PROBLEMS
from torch import Tensor

import scoresde
from scoresde import EDMSDE, METHODS, VESDE, VPSDE, RectifiedFlow, SubVPSDE, sample, tune
from scoresde.grids import angle, balanced, karras, uniform_log_snr, uniform_time
from scoresde.sde import SDE
from scoresde.store import write_json

RESULTS = Path(__file__).parent / "results"
SDES: dict[str, Callable[[], SDE]] = {
    "VP": partial(VPSDE, t_min=1e-3),
    "VE": VESDE,
    "EDM": EDMSDE,
    "subVP": partial(SubVPSDE, t_min=1e-3),
    "RF": partial(RectifiedFlow, t_min=1e-3),
    "VP-1e-5": VPSDE,  # its own t_min; not in the table by default
}
OURS = [
    "auto",
    "dpm++2m",
    "dpm++3m",
    "unipc2",
    "unipc3",
    "deis",
    "ipndm",
    "lms",
    "adams-noise",
    "adams-angle",
    "heun",
    "dpm2",
    "dpm3",
    "dpm++2s",
    "ddim",
]
BUDGETS = (5, 8, 10, 20)  # of the tables; the plot has the others too
PLOTTED = (5, 8, 10, 15, 20, 30, 50)
GRIDS = {"karras": karras, "log-SNR": uniform_log_snr, "t": uniform_time}
OUR_GRIDS = {"default": None, **GRIDS}

# peers as their users meet them: the order falls over the last steps
FALLING = {
    f"diffusers/{name}-lower": Peer("diffusers", diffusers_ratio(kind, lower_order_final=True, **options))
    for name, kind, options in (
        ("dpm++3m", "DPMSolverMultistepScheduler", dict(solver_order=3, **_DPM)),
        ("unipc2", "UniPCMultistepScheduler", dict(solver_order=2, **_DPM)),
        ("deis3", "DEISMultistepScheduler", dict(vp=True, output="epsilon", solver_order=3)),
    )
}
SAME = [
    "diffusers/euler",
    "azula/euler",
    "azula/ddim",
    "azula/heun",
    "azula/zeab2",
    "azula/zeab3",
    "azula/xeab2",
    "azula/zab4",
]
"""The same step as another peer's: DDIM, Heun, DEIS, DPM-Solver++ (2M, Heun) and LMS of diffusers."""
RIVALS = {name: p for name, p in PEERS.items() if p.order is not None and name not in SAME} | FALLING


def average(rows: list[tuple[float, float]]) -> tuple[float, float]:
    """Geometric means over problems; infinite where a method failed."""
    logs = np.log(np.maximum(np.array(rows), 1e-300))
    return tuple(np.exp(logs.mean(0)).tolist())


def score(cases: dict[str, Case], run: Callable[[Case], tuple[Tensor, int]], budget: int) -> dict[str, Any] | None:
    """One row: geometric means and the evaluations that were counted; None where the method is undefined here."""
    rows, used = [], set()
    for case in cases.values():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x, count = run(case)
        except (ValueError, RuntimeError, ArithmeticError, IndexError):
            return None
        if not bool(torch.isfinite(x).all()):
            return None
        rows.append(case.errors(x))
        used.add(count)
    if max(used) > budget:
        raise AssertionError(f"{used} evaluations counted in a budget of {budget}.")
    rms, median = average(rows)
    each = {name: [_digits(v) for v in row] for name, row in zip(cases, rows, strict=True)}
    return {"rms": _digits(rms), "median": _digits(median), "evaluations": max(used), "problems": each}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def best_grid(rows: dict[str, dict[str, Any] | None], key: str = "rms") -> dict[str, Any] | None:
    """The row of the grid with the smallest error, with the grid's name."""
    found = {name: row for name, row in rows.items() if row is not None}
    if not found:
        return None
    name = min(found, key=lambda g: found[g][key])
    return {"grid": name, **found[name]}


def our_rows(cases: dict[str, Case], nfe: int, method: str, grids: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    if nfe < METHODS[method]().nfe_per_step:
        return {}
    if method == "auto":
        return {"own": score(cases, lambda case: case.ours("auto", nfe), nfe)}
    return {
        name: score(cases, lambda case, grid=grid: case.ours(method, nfe, grid), nfe) for name, grid in grids.items()
    }


def rival_rows(cases: dict[str, Case], nfe: int, peer: Peer) -> dict[str, dict[str, Any] | None]:
    if nfe < peer.nfe:
        return {}
    return {
        name: score(cases, lambda case, grid=grid: case.theirs(peer, nfe, grid), nfe) for name, grid in GRIDS.items()
    }


def tuned_rows(cases: dict[str, Case], nfe: int) -> dict[str, Any] | None:
    """`tune` with its defaults on every problem's own model."""
    clock, made = time.perf_counter(), {}
    for name, case in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made[id(case)] = tune(case.model, nfe, seed=TUNING)
        print(f"    tuned at {nfe} on {name}: {made[id(case)].report}", flush=True)
    row = score(cases, lambda case: case.ours(made[id(case)], nfe), nfe)
    return row and {"grid": "own", **row, "seconds": _digits((time.perf_counter() - clock) / len(cases))}


def best_rival(rows: dict[str, dict[str, Any]], key: str) -> str | None:
    return min(rows, key=lambda name: rows[name][key], default=None)


def compare(cases: dict[str, Case], budgets: list[int], tuned: bool, plot: bool) -> dict[str, dict[str, Any]]:
    """{NFE: {"ours": {method: row}, "peers": {name: row}, "best_peer": {measure: name}}}, rows with their best grid.

    The best peer is the best pair of sampler and grid, for each of the two measures; at an NFE that is only plotted, of
    the four that were best at each smaller NFE of `budgets`.
    """
    peers = {name: p for name, p in RIVALS.items() if p.installed}
    found: dict[str, dict[str, Any]] = {}
    lines: set[str] = set()
    for nfe in sorted({*budgets, *(PLOTTED if plot else ())}):
        whole = nfe in budgets
        ours, theirs, by_median = {}, {}, {}
        for method in OURS if whole else ("auto", "dpm++2m", "ddim"):
            if row := best_grid(our_rows(cases, nfe, method, OUR_GRIDS)):
                ours[method] = row
        for name in peers if whole else sorted(lines):
            rows = rival_rows(cases, nfe, peers[name])
            if row := best_grid(rows):
                theirs[name], by_median[name] = row, best_grid(rows, "median")
        best = {"rms": best_rival(theirs, "rms"), "median": best_rival(by_median, "median")}
        entry = {"ours": ours, "peers": theirs, "best_peer": {}}
        for key, name in best.items():
            if name:
                entry["best_peer"][key] = {"name": name, **(theirs if key == "rms" else by_median)[name]}
        for rows, key in ((theirs, "rms"), (by_median, "median")):
            lines.update(sorted(rows, key=lambda name: rows[name][key])[:4])
        if whole and tuned:
            ours["tuned"] = tuned_rows(cases, nfe)
        for row in (row for side in (ours, theirs) for name, row in side.items() if name not in ("auto", "tuned")):
            del row["problems"]
        found[str(nfe)] = entry
    return found


def show(sde: str, found: dict[str, dict[str, Any]], budgets: list[int]) -> None:
    """The table of one process: ours, then the peers, a star for the best peer of either measure."""
    print(f"\n{sde}: RMS / median error, geometric mean over problems (grid)")
    print(f"{'method':26s}" + "".join(f"{f'{n} NFE':>28s}" for n in budgets))
    for side in ("ours", "peers"):
        names = dict.fromkeys(name for n in budgets for name in found[str(n)][side])
        last = str(budgets[-1])
        for name in sorted(names, key=lambda m: found[last][side].get(m, {"rms": math.inf})["rms"]):
            print(f"{name:26s}" + "".join(f"{_cell(found[str(n)], side, name):>28s}" for n in budgets))
    for key in ("rms", "median"):
        cells = [found[str(n)]["best_peer"].get(key) for n in budgets]
        print(
            f"best peer, {key:15s}"
            + "".join(f"{'-' if c is None else f'{c[key]:.4f} ' + c['name'].split('/')[1]:>28s}" for c in cells)
        )


def _cell(entry: dict[str, Any], side: str, name: str) -> str:
    row = entry[side].get(name)
    if row is None:
        return "-"
    star = "*" if any(best["name"] == name for best in entry["best_peer"].values()) and side == "peers" else ""
    short = {"karras": "k", "log-SNR": "l", "t": "t", "own": "o", "default": "d"}[row["grid"]]
    return f"{row['rms']:.4f} / {row['median']:.5f} ({short}){star}"


def measure_again(results: dict[str, Any], sde: str, cases: dict[str, Case], methods: list[str]) -> None:
    """New rows of some of our methods, in place; everything else stays as it was measured."""
    for nfe, entry in results["sdes"][sde]["nfe"].items():
        for method in methods:
            row = best_grid(our_rows(cases, int(nfe), method, OUR_GRIDS))
            if row and method != "auto":
                del row["problems"]
            if row and method in entry["ours"]:
                entry["ours"][method] = row
                print(f"{sde} {nfe:>3s} NFE {method:10s} {_cell(entry, 'ours', method)}", flush=True)


# -- default grids ---------------------------------------------------------------------------------------------------


def compare_grids(cases: dict[str, Case], budgets: list[int]) -> dict[str, dict[str, Any]]:
    """{NFE: {method: {grid: [rms, median]}}} over more grids than the comparison with peers has."""
    c = next(iter(cases.values())).model.sigma_data
    grids = {**GRIDS, "angle": angle, "angle-c": partial(angle, scale=c), "balanced": balanced}
    found: dict[str, dict[str, Any]] = {}
    for nfe in budgets:
        print(f"{nfe:3d} NFE{'':18s}" + "".join(f"{g:>20s}" for g in grids))
        found[str(nfe)] = {}
        for method in OURS[1:]:
            rows = our_rows(cases, nfe, method, grids)
            found[str(nfe)][method] = {g: r and [r["rms"], r["median"]] for g, r in rows.items()}
            cells = [f"{r['rms']:.4f} / {r['median']:.5f}" if r else "-" for r in rows.values()]
            print(f"  {method:23s}" + "".join(f"{c:>20s}" for c in cells), flush=True)
    return found


# -- a trained network -----------------------------------------------------------------------------------------------


class CountedNet(torch.nn.Module):
    """A network that counts its calls."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net, self.count = net, 0

    def forward(self, *args: Any) -> Tensor:
        self.count += 1
        return self.net(*args)


SMALL = dict(starts=96, held_out=32, iterations=4, jacobian_starts=8, teacher_nfe=60)
"""Settings of `tune` for a network on one CPU core."""


def on_network(
    path: Path, budgets: list[int], save: Callable[[dict[str, Any]], None], starts: int = 64, tolerance: float = 1e-5
) -> None:
    """The same errors on a trained model in float32, and of the reference at a tolerance ten times as large.

    `save` is handed what there is after every budget.
    """
    model = scoresde.load(path)
    model.eval().requires_grad_(False)
    net = model.net = CountedNet(model.net)
    x = model.sde.prior_std * torch.randn((starts, *model.event_shape), generator=generator(SCORED))
    clock = time.perf_counter()
    end = flow_end(model, x, tolerance)
    uncertain = errors(flow_end(model, x, 10 * tolerance), end, model.sde)
    print(
        f"{type(model.sde).__name__}, examples {model.event_shape}, {starts} starts; reference in "
        f"{time.perf_counter() - clock:.0f} s, and at tolerance {10 * tolerance:g}: {uncertain[0]:.2g} / {uncertain[1]:.2g}"
    )
    found: dict[str, Any] = {}
    about = {
        "sde": type(model.sde).__name__,
        "starts": starts,
        "reference": [_digits(v) for v in uncertain],
        "tune": SMALL,
    }
    for nfe in budgets:
        clock = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = tune(model, nfe, seed=TUNING, **SMALL)
        print(f"  tuned in {time.perf_counter() - clock:.0f} s: {tuned.report}", flush=True)
        entry = found[str(nfe)] = {}
        for name in ("auto", tuned, "dpm++2m", "unipc2", "ddim", "heun"):
            rows = {}
            chosen = METHODS[name]() if isinstance(name, str) else name
            for label, grid in ({"own": None} if name in ("auto", tuned) else GRIDS).items():
                net.count = 0
                steps = nfe // chosen.nfe_per_step
                y = sample(model, tuple(x.shape), method=chosen, steps=steps, x_init=x, grid=grid, denoise_final=False)
                rms, median = errors(y, end, model.sde)
                rows[label] = {"rms": _digits(rms), "median": _digits(median), "evaluations": net.count}
            entry["tuned" if name is tuned else name] = best_grid(rows)
        print(
            f"{nfe:3d} NFE  " + "  ".join(f"{n} {r['rms']:.4f}/{r['median']:.4f}" for n, r in entry.items()), flush=True
        )
        save(about | {"nfe": found})


# -- the plot --------------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any], path: Path, sde: str = "VP") -> None:
    """Both errors against NFE, axes logarithmic."""
    from scoresde.plots import save
    from scoresde.plots.style import new_figure

    # Okabe & Ito's palette
    lines = {
        "tuned": ("tuned", "#D55E00", "o"),
        "auto": ("auto", "#0072B2", "s"),
        "best": ("best peer at each NFE", "#000000", "D"),
        "dpm++2m": ("dpm++2m", "#009E73", "^"),
        "ddim": ("ddim", "#999999", "v"),
    }
    figure = new_figure(9, 4.0)
    axes = figure.subplots(1, 2, sharex=True)
    for ax, key, title in zip(axes, ("rms", "median"), ("RMS", "median over starts"), strict=True):
        for name, (label, colour, marker) in lines.items():
            points = []
            for nfe, entry in sorted(results["sdes"][sde]["nfe"].items(), key=lambda item: int(item[0])):
                row = entry["best_peer"].get(key) if name == "best" else entry["ours"].get(name)
                if row:
                    points.append((int(nfe), row[key]))
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, lw=1.8, label=label)
        ax.set(xscale="log", yscale="log", xlabel="network evaluations", title=f"{sde}: {title}")
        ax.set_xticks(PLOTTED, [str(n) for n in PLOTTED])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("error per dimension at t_min")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=10)
    save(figure, path)


def cases_of(sde: str, names: list[str], seeds: int, starts: int) -> Iterator[tuple[str, Case]]:
    for name in names:
        clock = time.perf_counter()
        case = Case(name, SDES[sde](), seeds, starts)
        print(f"{sde} {name}: reference in {time.perf_counter() - clock:.0f} s", flush=True)
        yield name, case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sde", nargs="+", default=list(SDES)[:5], choices=list(SDES))
    parser.add_argument("--nfe", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=4, help="sets of starts")
    parser.add_argument("--starts", type=int, default=1024, help="starts in a set (gmm64: at most 160)")
    parser.add_argument("--quick", action="store_true", help="VP, two problems, one set of 256, no tuning, no files")
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--only", nargs="+", choices=OURS, help="measure these of ours again and keep all else that is stored"
    )
    parser.add_argument("--check", action="store_true", help="compare the references with SciPy's DOP853")
    parser.add_argument("--grids", action="store_true", help="compare time grids of our methods instead")
    parser.add_argument("--digits", type=Path, metavar="PATH", help="run on a trained model's folder instead")
    parser.add_argument("--json", type=Path, default=RESULTS / "samplers.json", help="parts already there are kept")
    parser.add_argument("--plot", type=Path, default=RESULTS / "samplers.png")
    args = parser.parse_args()
    if args.quick:
        args.sde, args.problems, args.seeds, args.starts, args.tune = ["VP"], ["ring8", "moons"], 1, 256, False
    results: dict[str, Any] = {}
    if args.json.exists() and not args.quick:
        results = importlib.import_module("json").loads(args.json.read_text())
    results["versions"] = versions()
    settings = {"seeds": args.seeds, "starts": args.starts, "problems": args.problems}
    if args.digits:
        on_network(args.digits, args.nfe, lambda found: write_json(args.json, results | {"digits": found}))
        return
    else:
        for sde in args.sde:
            cases = dict(cases_of(sde, args.problems, args.seeds, args.starts))
            if args.check:
                for name, case in cases.items():
                    print(f"{sde} {name}: largest difference from DOP853 {check_reference(case):.1e}")
            if args.only:
                measure_again(results, sde, cases, args.only)
            elif args.grids:
                print(f"{sde}: RMS / median error by time grid")
                results.setdefault("grids", {})[sde] = settings | {"nfe": compare_grids(cases, args.nfe)}
            else:
                found = compare(cases, args.nfe, args.tune, plot=sde == "VP" and not args.quick)
                results.setdefault("sdes", {})[sde] = settings | {"nfe": found}
                show(sde, found, args.nfe)
            if not args.quick:
                write_json(args.json, results)
    if args.quick:
        return
    write_json(args.json, results)
    if "VP" in results.get("sdes", {}):
        draw(results, args.plot)
    print(f"written to {args.json} and {args.plot}")


if __name__ == "__main__":
    main()
