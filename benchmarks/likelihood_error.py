"""Error of `log_prob` against closed-form truth on exact mixtures, and what it costs.

    python benchmarks/likelihood_error.py [--n 400] [--out benchmarks/results/likelihood_error.json]

Exact trace, default tolerance; truth is the mixture's own marginal at t_min. Errors in nats: mean and maximum over n
points drawn from the mixture; NFE is the mean number of evaluations per point. `vs p_0` compares with the density of
noise-free data instead, so it contains the noise of standard deviation sigma(t_min), which no solver can remove.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from problems import PROBLEMS

from scoresde import EDMSDE, VESDE, VPSDE, CosineSDE, Exact, GaussianMixture, RectifiedFlow, SubVPSDE, log_prob
from scoresde.store import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--problems", nargs="+", default=["ring8", "grid25", "moons"], choices=list(PROBLEMS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "likelihood_error.json")
    args = parser.parse_args()
    rows = []
    print(f"{'problem':8s} {'SDE':14s} {'mean':>9s} {'max':>9s} {'vs p_0':>9s} {'NFE':>6s}")
    for problem in args.problems:
        mixture = GaussianMixture(*PROBLEMS[problem]())
        x = mixture.sample(args.n, seed=11)
        for sde in (VPSDE(), SubVPSDE(), VESDE(), CosineSDE(), EDMSDE(), RectifiedFlow()):
            model = mixture.diffuse(sde)
            result = log_prob(model, x, divergence=Exact())
            error = (result.value - model.log_prob(x, sde.t_min)).abs()
            row = {
                "problem": problem,
                "sde": type(sde).__name__,
                "mean_error": float(error.mean()),
                "max_error": float(error.max()),
                "mean_error_vs_p0": float((result.value - mixture.log_prob(x)).abs().mean()),
                "nfe": float(result.nfe.double().mean()),
            }
            rows.append(row)
            print(
                f"{problem:8s} {row['sde']:14s} {row['mean_error']:9.1e} {row['max_error']:9.1e} "
                f"{row['mean_error_vs_p0']:9.1e} {row['nfe']:6.1f}",
                flush=True,
            )
    write_json(args.out, {"n": args.n, "torch": torch.__version__, "rows": rows})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
