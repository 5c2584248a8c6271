"""How far each sampler's samples are from exact ones, beside the noise floor of two exact sample sets.

    python benchmarks/sampler_distance.py [--n 2000] [--seeds 5] [--out benchmarks/results/sampler_distance.json]

Exact mixtures, so the only errors are the sampler's own and sampling noise. Distance: sliced 2-Wasserstein between n
samples of the method (defaults, float32) and n exact ones, the median over seeds. Floor: the median and the 95 %
quantile of that distance between 40 pairs of exact sets. Beside it, the largest error of the mean and of the covariance,
again as medians over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
from problems import PROBLEMS

from scoresde import METHODS, VESDE, VPSDE, GaussianMixture, SubVPSDE, sample
from scoresde.metrics import sliced_wasserstein
from scoresde.store import write_json

PAIRS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", nargs="+", default=["ring8", "moons"], choices=list(PROBLEMS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sampler_distance.json")
    args = parser.parse_args()
    rows = []
    print(
        f"{'problem':8s} {'SDE':9s} {'method':18s} {'sliced W2':>9s} {'floor':>7s} {'95 %':>7s} {'mean':>7s} {'cov':>7s} {'s':>6s}"
    )
    for problem in args.problems:
        mixture = GaussianMixture(*PROBLEMS[problem]())
        draws = [mixture.sample(args.n, seed=1000 + i) for i in range(PAIRS + 1)]
        floors = torch.tensor([sliced_wasserstein(a, b) for a, b in itertools.pairwise(draws)], dtype=torch.float64)
        floor, high = float(floors.median()), float(floors.quantile(0.95))
        for sde in (VPSDE(), SubVPSDE(), VESDE()):
            model = mixture.diffuse(sde)
            for method in METHODS:
                clock, runs = time.perf_counter(), []
                for seed in range(args.seeds):
                    x = sample(model, (args.n, *mixture.event_shape), method=method, seed=seed).double()
                    runs.append(
                        (
                            sliced_wasserstein(x, draws[seed]),
                            float((x.mean(0) - mixture.mean).abs().max()),
                            float((torch.cov(x.T) - mixture.covariance).abs().max()),
                        )
                    )
                distance, mean, covariance = torch.tensor(runs, dtype=torch.float64).median(0).values.tolist()
                row = {
                    "problem": problem,
                    "sde": type(sde).__name__,
                    "method": method,
                    "sliced_wasserstein": distance,
                    "floor_median": floor,
                    "floor_95": high,
                    "mean_error": mean,
                    "covariance_error": covariance,
                    "seconds": (time.perf_counter() - clock) / args.seeds,
                }
                rows.append(row)
                print(
                    f"{problem:8s} {row['sde']:9s} {method:18s} {row['sliced_wasserstein']:9.4f} {floor:7.4f} {high:7.4f} "
                    f"{row['mean_error']:7.4f} {row['covariance_error']:7.4f} {row['seconds']:6.1f}",
                    flush=True,
                )
    write_json(args.out, {"n": args.n, "seeds": args.seeds, "torch": torch.__version__, "rows": rows})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
