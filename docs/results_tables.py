"""Fills the measured tables of the site from benchmarks/results/*.json: `python docs/results_tables.py` (`--check`: only compares).

A page asks for a table by a pair of comments, `<!-- measured: NAME -->` and `<!-- end -->`; what stands between them is written
here and nowhere else. Every figure is read from a JSON file, so a table cannot say what was not measured.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
PAGES = (HERE / "results.md", HERE / "choose-a-sampler.md")
BLOCK = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)

LIBRARIES = ("torchdiffeq", "torchode", "flow_matching", "diffusers", "azula", "torchsde")
PROCESSES = {"VP": "VP", "VE": "VE", "EDM": "EDM", "subVP": "sub-VP", "RF": "rectified flow"}
BITS_64 = 64 * math.log(2)  # nats in a bit/dim of a digit of 64 pixels
NETWORKS = {"ddpm": "DDPM", "ncsnpp": "NCSN++ of the 256 px layout", "dit": "DiT-S/2, four blocks"}


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, its first row the heads."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(command: str | None, caption: str, *parts: str) -> str:
    """The command that makes a result again, what is shown, and the table."""
    first = [f"Command: `{command}`."] if command else []
    return "\n\n".join((*first, " ".join(caption.split()), *parts))


def named(method: str) -> str:
    """A method as code; another library's with its library in front."""
    library, _, rest = method.partition("/")
    return f"{library} {rest}" if rest and library in LIBRARIES else f"`{method}`"


def versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())


def interval(values: Iterable[float], form: str = ".2f") -> str:
    values = list(values)
    return f"{min(values):{form}} to {max(values):{form}}"


# -- likelihoods -----------------------------------------------------------------------------------------------------


def digits_bits() -> str:
    found = read("digits")
    data = found["data"]
    rows = [
        (
            f"`{row['command']}`",
            row["training"],
            f"{row['parameters'] / 1e6:.2f} M",
            row["solver"],
            f"{row['bits_per_dim']:.3f} ± {row['stderr']:.3f}",
        )
        for row in found["rows"]
    ]
    notes = {row["note"]: None for row in found["rows"] if "note" in row}
    caption = f"""{data["set"]}, {data["levels"]} grey levels, {data["dequantization"]} dequantization,
        {data["test_images"]} test images that were never looked at in any choice; probability flow, estimated
        trace; ± is the standard error over images, training seeds: {found["seeds"]}. Recorded {found["recorded"]}:
        {found["date"]}, {found["machine"]}, {versions(found["versions"])}. The runs solved by tsit5 were
        {"; ".join(notes)}: a retraining will not repeat them to the last digit."""
    return section(None, caption, table(("command", "training", "parameters", "solver", "test bits/dim"), rows))


def digits_others() -> str:
    found = read("digits")["other_models"]
    rows = [(row["model"], f"{row['bits_per_dim']:.2f}") for row in found["rows"]]
    return section(None, f"Recorded, {found['recorded']}.", table(("model", "test bits/dim"), rows))


def likelihood_error() -> str:
    found = read("likelihood_error")
    cells = {(row["sde"], row["problem"]): row for row in found["rows"]}
    sdes, problems = dict.fromkeys(sde for sde, _ in cells), dict.fromkeys(problem for _, problem in cells)

    def cell(row: dict[str, float]) -> str:
        return f"{row['mean_error']:.0e} ({row['max_error']:.0e}), {row['nfe']:.0f}"

    caption = f"""Mean (maximum) error of `log_prob` in nats over {found["n"]} points at the default tolerance with
        the exact trace, and evaluations per point, about half of them forward passes alone; torch {found["torch"]}."""
    rows = [(f"`{sde}`", *(cell(cells[sde, problem]) for problem in problems)) for sde in sdes]
    return section("python benchmarks/likelihood_error.py", caption, table(("process", *problems), rows))


def likelihood_cost() -> str:
    found = read("likelihood")
    problems = {name: p for name, p in found["problems"].items() if p["kind"] == "2d"}
    methods = dict.fromkeys(m for p in problems.values() for m in p["targets"])
    targets = list(dict.fromkeys(t for p in problems.values() for target in p["targets"].values() for t in target))

    def cost(problem: str, method: str, target: str) -> float:
        """NaN where a method did not reach the target."""
        return float(problems[problem]["targets"].get(method, {}).get(target, {}).get("cost", math.nan))

    def cell(problem: str, method: str) -> str:
        costs = [cost(problem, method, target) for target in targets]
        return " / ".join("-" if math.isnan(c) else f"{c:.0f}" for c in costs)

    exact = [name for name in problems if "-" not in name]  # "moons-mlp" is learned
    ratios = [cost(p, "decoupled", targets[0]) / cost(p, "flow_matching/dopri5", targets[0]) for p in exact]
    points = {p["points"] for p in problems.values()}
    caption = f"""Cost in F: CPU time over that of one bare forward pass of the same batch of {max(points)} points,
        one thread. Each cell is the cost of a mean error of {" / ".join(f"{float(t):.0e}" for t in targets)} nats
        at tolerances chosen on other points; exact trace, except score_sde's way (SciPy's RK45, two forward passes
        and one probe), which is held to its probe's exact value. `decoupled` is the default. For the first error it
        costs {interval(ratios)} of flow_matching's cost on the exact mixtures. {versions(found["versions"])};
        rounds: {found["rounds"]}."""
    names = {name: "perceptron trained on moons" if name == "moons-mlp" else name for name in problems}
    rows = [(named(m), *(cell(p, m) for p in problems)) for m in methods]
    return section("python benchmarks/likelihood.py --points 2048", caption, table(("", *names.values()), rows))


def likelihood_digits() -> str:
    problem = read("likelihood")["problems"]["digits-noise"]
    (target,) = {min(t, key=float) for t in problem["targets"].values()}
    targets = [
        (named(method), f"{found[target]['cost']:.0f}")
        for method, found in problem["targets"].items()
        if target in found
    ]
    total = [
        (
            named(row["method"]),
            row["trace"],
            f"{row['cost']:.0f}",
            f"{row['total_rms']:.2g}",
            f"{row['total_rms'] / BITS_64:.2g}",
        )
        for row in problem["total"]
    ]
    caption = f"""A noise-predicting U-Net on digits, 64 dimensions, {problem["points"]} test images: error of one
        image against the exact trace, root mean square, in nats and bits/dim, and its cost in F. One fixed probe
        scatters by {problem["one_probe_std"]:.1f} nats ({problem["one_probe_std"] / BITS_64:.2g} bits/dim) whatever
        the solver. {problem["note"]}."""
    second = f"""Cost in F of {float(target):.0e} nats of solver error, against the exact value for the one probe that a
        solve is given and keeps:"""
    return section(
        "python benchmarks/likelihood.py --digits PATH",
        caption,
        table(("solver", "trace", "cost", "nats", "bits/dim"), total),
        " ".join(second.split()),
        table(("solver", "cost"), targets),
    )


# -- samplers --------------------------------------------------------------------------------------------------------


def cell(row: dict[str, float]) -> str:
    return f"{row['rms']:.2g} / {row['median']:.2g}"


def best(entry: dict[str, Any]) -> dict[str, float]:
    """The best of the peers, for each measure on its own."""
    return {key: entry["best_peer"][key][key] for key in ("rms", "median")}


def few_rows(
    process: dict[str, Any], budgets: list[str], methods: Iterable[str], show: Callable[..., str]
) -> list[list[str]]:
    label = {"tuned": "`tune`"}
    at = [process["nfe"][n] for n in budgets]
    rows = [[label.get(m, f"`{m}`"), *(show(e["ours"][m]) for e in at)] for m in methods if m in at[0]["ours"]]
    return [*rows, ["best of diffusers and azula", *(show(best(e)) for e in at)]]


def budgets_of(found: dict[str, Any]) -> list[str]:
    """The budgets at which every method was measured on every process."""
    return [
        n
        for n in found["sdes"]["VP"]["nfe"]
        if all("tuned" in s["nfe"].get(n, {"ours": ()})["ours"] for s in found["sdes"].values())
    ]


def few_evaluations() -> str:
    found = read("samplers")
    budgets = budgets_of(found)
    rows = []
    for key, name in PROCESSES.items():
        methods = ("tuned", "auto", "dpm++2m", "unipc2", "deis") if key == "VP" else ("tuned", "auto")
        rows += [[name, *row] for row in few_rows(found["sdes"][key], budgets, methods, cell)]
    sdes = found["sdes"]
    peers = {key: len(sdes[key]["nfe"][budgets[0]]["peers"]) for key in PROCESSES}
    seconds = [s["nfe"][n]["ours"]["tuned"]["seconds"] for s in sdes.values() for n in budgets]
    caption = f"""Exact mixtures in float64 ({", ".join(sdes["VP"]["problems"])}), the same starts for all: root
        mean square per dimension / median over starts of the distance to the exact end of the probability flow,
        geometric mean over the problems, by the number of network evaluations. Our other methods stand at the best of
        their default and three published grids in every cell (`unipc2` and `deis` of the three alone), the two libraries of
        the three, of whose {peers["VP"]} configurations
        ({min(peers.values())} outside VP) the best is chosen anew for each measure. Up to {sdes["VP"]["starts"]} starts,
        {sdes["VP"]["seeds"]} seeds under VP and {sdes["VE"]["seeds"]} elsewhere; `tune` learned on other starts of
        the same model, {min(seconds):.0f} to {max(seconds):.0f} seconds a problem, from the rule before its nodes followed the
        spread of the data. {versions(found["versions"])}."""
    return section("python benchmarks/samplers.py", caption, table(("process", "method", *budgets), rows))


def few_evaluations_vp() -> str:
    found = read("samplers")
    budgets = budgets_of(found)
    rows = few_rows(found["sdes"]["VP"], budgets, ("tuned", "auto", "dpm++2m"), lambda row: f"{row['rms']:.2g}")
    return table(("evaluations", *budgets), rows)


def few_evaluations_digits() -> str:
    found = read("samplers")
    digits = found["digits"]
    methods = dict.fromkeys(m for entry in digits["nfe"].values() for m in entry)
    rows = [["`tune`" if m == "tuned" else f"`{m}`", *(cell(e[m]) for e in digits["nfe"].values())] for m in methods]
    caption = f"""A network trained on digits (`--preset digits`, 64 dimensions, `{digits["sde"]}`), float32,
        {digits["starts"]} starts, root mean square per dimension / median; each method at its best grid.
        `auto` and `tune` are of the rule before its nodes followed the spread of the data.
        {versions({"torch": found["versions"]["torch"]})}."""
    return section(
        "python benchmarks/samplers.py --digits runs/digits/model", caption, table(("method", *digits["nfe"]), rows)
    )


FASHION = {
    "vp-edm": "VP, EDM's parameterization",
    "vp-noise": "VP, noise prediction",
    "edm": "EDM",
    "flow": "rectified flow, velocity",
}


def few_evaluations_fashion() -> str:
    found = read("few_steps_network")
    settings, parts = found["settings"], []
    budgets = [str(n) for n in settings["nfe"]]
    for kind, methods in found["networks"].items():
        rows = []
        for method, row in methods.items():
            rows.append((f"`{method}`", *("{:.3f} / {:.3f}".format(*row[n]["default"]) for n in budgets)))
            if method != "auto":
                best = (min(row[n]["published"].values()) for n in budgets)
                rows.append((f"`{method}`, best published grid", *("{:.3f} / {:.3f}".format(*v) for v in best)))
        chosen = ", on which grids and constants were chosen" if kind in settings["chosen_on"] else ""
        parts += [f"**{FASHION[kind]}**{chosen}:", table(("method", *budgets), rows)]
    caption = f"""Small U-Nets trained on Fashion-MNIST (28x28 pixels whose mean is far from zero, 784 dimensions) for
        some minutes of CPU time; root mean square / median over {settings["starts"]} starts of the distance per dimension to
        the end of the probability flow, by the number of network evaluations. Each method on its default grid, and on the
        best, chosen anew in every cell, of three published grids (equal steps in (sigma/alpha)^(1/7), in log-SNR and in t).
        {versions(found["versions"])}."""
    return section("python benchmarks/few_steps_network.py", caption, *parts)


def overhead() -> str:
    found = read("overhead")
    rows = found["rows"]

    def of(names: Iterable[str], key: str) -> list[float]:
        return [row[key] for row in rows if row["sampler"] in names]

    ours = [row["sampler"] for row in rows if "/" not in row["sampler"]]
    theirs = [row["sampler"] for row in rows if row["sampler"].startswith("diffusers/")]
    same = [name for name in ours if f"diffusers/{name}" in theirs]

    def percent(names: Iterable[str]) -> str:
        return interval((round(100 * (r - 1)) for r in of(names, "unet_ratio")), "d")

    caption = f"""CPU time of a sampler over that of its network evaluations alone, {found["steps"]} steps, one
        thread, and microseconds per evaluation with a network that does nothing; medians of {found["repeats"]}
        turns on a busy machine, so compare within the table. diffusers' schedulers cost
        {interval(of(theirs, "null_microseconds_per_nfe"), ".0f")} microseconds a step, the same methods here
        {interval(of(same, "null_microseconds_per_nfe"), ".0f")}: beside the small U-Net {percent(theirs)} % against
        {percent(same)} %. {versions(found["versions"])}."""
    lines = [
        (
            named(row["sampler"]),
            f"{row['mlp_ratio']:.2f}",
            f"{row['unet_ratio']:.2f}",
            f"{row['null_microseconds_per_nfe']:.0f}",
        )
        for row in rows
    ]
    return section(
        "python benchmarks/overhead.py",
        caption,
        table(("sampler", "MLP, batch 512", "small U-Net", "microseconds"), lines),
    )


def networks() -> str:
    found = read("networks")
    cells = {
        (row["network"], row["task"], row["batch"]): row["ratio"]
        for row in found["rows"]
        if row["part"] == "equal" and row["layout"] == "contiguous"
    }
    batches = found["options"]["batches"]
    rows = [
        (name, *(" / ".join(f"{cells[key, task, b]:.2f}" for b in batches) for task in ("forward", "train")))
        for key, name in NETWORKS.items()
    ]
    compiled = interval(row["ratio"] for row in found["rows"] if row["part"] == "compiled")
    turns = interval((row["turns"] for row in found["rows"] if row["part"] == "equal"), "d")
    caption = f"""CPU time of ours over that of diffusers' network with the same weights, 3 x 32 x 32, width
        {found["options"]["width"]}, one thread, contiguous, medians of {turns} interleaved turns on a noisy
        machine. `torch.compile` takes {compiled} of the eager time. {versions(found["versions"])}, {found["date"]};
        not measured on a GPU."""
    of = " / ".join(map(str, batches))
    return section(
        found["command"], caption, table(("network", f"forward, batch {of}", f"training step, batch {of}"), rows)
    )


def sampler_distance() -> str:
    found = read("sampler_distance")
    rows = [row for row in found["rows"] if row["problem"] == "ring8"]
    cells = {(row["method"], row["sde"]): row["sliced_wasserstein"] for row in rows}
    methods, sdes = dict.fromkeys(m for m, _ in cells), dict.fromkeys(s for _, s in cells)
    floor, ceiling = rows[0]["floor_median"], rows[0]["floor_95"]
    beyond = sum(distance > ceiling for distance in cells.values())
    caption = f"""Sliced 2-Wasserstein distance of {found["n"]} samples to as many exact ones, median over
        {found["seeds"]} seeds, default settings, eight-component ring. Two exact sets are themselves {floor:.3f}
        apart (median; 95 % of pairs within {ceiling:.3f}); {beyond or "none"} of the {len(cells)} entries
        {"lie" if beyond else "lies"} beyond that. torch {found["torch"]}."""
    lines = [(f"`{m}`", *(f"{cells[m, s]:.3f}" for s in sdes)) for m in methods]
    return section(
        "python benchmarks/sampler_distance.py", caption, table(("method", *(f"`{s}`" for s in sdes)), lines)
    )


TABLES: dict[str, Callable[[], str]] = {
    "digits-bits": digits_bits,
    "digits-others": digits_others,
    "likelihood-error": likelihood_error,
    "likelihood-cost": likelihood_cost,
    "likelihood-digits": likelihood_digits,
    "few-evaluations": few_evaluations,
    "few-evaluations-vp": few_evaluations_vp,
    "few-evaluations-digits": few_evaluations_digits,
    "few-evaluations-fashion": few_evaluations_fashion,
    "overhead": overhead,
    "networks": networks,
    "sampler-distance": sampler_distance,
}


def filled(text: str) -> str:
    """A page with its measured tables as the JSON files have them."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def main() -> int:
    """Writes the pages; with --check it writes nothing and is 1 where one is out of date."""
    stale = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    for page in stale:
        if "--check" in sys.argv:
            print(f"{page.name} is out of date: run python docs/results_tables.py")
        else:
            page.write_text(filled(page.read_text()))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
