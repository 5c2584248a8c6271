r"""How far deterministic samplers are from the end of the probability flow on networks trained on Fashion-MNIST.

    python benchmarks/few_steps_network.py --train vp-edm vp-noise edm --minutes 9   # into runs/few-steps, once (CPU minutes each)
    python benchmarks/few_steps_network.py                                           # measures those that are there

Each method runs on its default grid and on three published ones: equal steps in (sigma/alpha)^(1/7), in log-SNR and in t. The
error is the root mean square over starts and dimensions, and the median over starts, of the distance in y = x/alpha(t_min) to
the adaptive solution of the same network in float64. The grids and the constants of "auto" were chosen on vp-edm and on exact
mixtures; the other networks only report.

The data are those of Debian's package dataset-fashion-mnist (/usr/share/datasets/fashion-mnist).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scoresde
from scoresde import EDMSDE, METHODS, VPSDE, RectifiedFlow, ScoreModel, ScoreNet, denoising_loss, sample
from scoresde.grids import karras, uniform_log_snr, uniform_time
from scoresde.nets import LeanUNet, UNet
from scoresde.samplers import ProbabilityFlow
from scoresde.store import load_model, save_model, write_json

RESULTS = Path(__file__).parent / "results" / "few_steps_network.json"
IMAGES = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
PUBLISHED = {"karras": karras, "log-SNR": uniform_log_snr, "t": uniform_time}
OURS = ("auto", "ddim", "dpm++2m", "dpm++3m", "unipc2", "unipc3", "deis", "ipndm", "adams-angle", "heun")
SHAPE = (1, 28, 28)


def network(kind: str) -> tuple[ScoreNet, dict[str, Any]]:
    """An untrained model and the options of its loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lean = dict(channels=(24, 48), blocks=(1, 2), dropout=0.0)
        known = dict(sigma_data=0.5, event_shape=SHAPE)
        if kind == "vp-edm":
            net = LeanUNet(1, 1, SHAPE[1:], channels=(24, 48, 64), blocks=(1, 1, 2), dropout=0.0)
            options = dict(weighting="likelihood", time_sampling="importance")
            return ScoreNet(net, VPSDE(t_min=1e-3), "edm", **known), options
        if kind == "vp-noise":
            net = UNet(1, 1, SHAPE[1:], width=24, multipliers=(1, 2), blocks=1, attention=())
            return ScoreNet(net, VPSDE(t_min=1e-3), "noise", event_shape=SHAPE), dict(weighting="sigma2")
        net = LeanUNet(1, 1, SHAPE[1:], **lean)
        if kind == "edm":
            return ScoreNet(net, EDMSDE(), "edm", **known), dict(weighting="edm", time_sampling="log-normal")
        return ScoreNet(net, RectifiedFlow(t_min=1e-3), "velocity", event_shape=SHAPE), {}


KINDS = ("vp-edm", "vp-noise", "edm", "flow")


def images() -> Tensor:
    """The 60,000 training images, uint8."""
    with gzip.open(IMAGES) as f:
        return torch.from_numpy(np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, *SHAPE).copy())


def train(kind: str, minutes: float, folder: Path) -> None:
    """AdamW with a cosine schedule over `minutes` of CPU time, on one thread; the averaged weights are saved."""
    data, (model, options) = images(), network(kind)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    begun, step = time.process_time(), 0
    while (done := (time.process_time() - begun) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        g = torch.Generator().manual_seed(step)
        k = data[torch.randint(len(data), (64,), generator=g)].float()
        loss = (
            denoising_loss(model, (k + torch.rand(k.shape, generator=g)) / 128 - 1, seed=step, **options).mean() / 784
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - min(0.998, (1 + step) / (10 + step)))
        step += 1
    save_model(average, folder / kind)
    print(f"{kind}: {step} steps; {folder / kind}", flush=True)


class Case:
    """A network, starts, and where the probability flow of the network in float64 takes them."""

    def __init__(self, model: ScoreModel, starts: int):
        self.model = model.requires_grad_(False)
        sde = model.sde
        g = torch.Generator().manual_seed(123)
        self.x = sde.prior_std * torch.randn(starts, *SHAPE, generator=g)
        exact, ends = copy.deepcopy(model).double(), torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
        solver = ProbabilityFlow(1e-5, 1e-5, max_nfe=100_000)
        self.end = sample(exact, self.x.shape, method=solver, x_init=self.x.double(), grid=ends)

    def error(self, method: str, nfe: int, grid: Any = None) -> tuple[float, float]:
        """(root mean square, median) after as many steps as `nfe` evaluations hold."""
        steps = max(1, nfe // METHODS[method]().nfe_per_step)
        x = sample(self.model, self.x.shape, method=method, steps=steps, x_init=self.x, grid=grid, denoise_final=False)
        sde = self.model.sde
        square = ((x.double() - self.end) / float(sde.alpha(sde.t_min))).flatten(1).square().mean(1)
        return float(f"{float(square.mean().sqrt()):.4g}"), float(f"{float(square.median().sqrt()):.4g}")


def measure(case: Case, budgets: list[int]) -> dict[str, Any]:
    """{method: {NFE: {"default": [rms, median], "published": {grid: [rms, median]}}}}."""
    found: dict[str, Any] = {}
    for method in OURS:
        rows: dict[str, Any] = {}
        for nfe in budgets:
            rows[str(nfe)] = {"default": case.error(method, nfe)}
            if method != "auto":
                rows[str(nfe)]["published"] = {name: case.error(method, nfe, g) for name, g in PUBLISHED.items()}
        found[method] = rows
        print(f"  {method:12s}" + "".join(_cell(rows[str(nfe)]) for nfe in budgets), flush=True)
    return found


def _cell(row: dict[str, Any]) -> str:
    rms, median = row["default"]
    other = min(row["published"].values()) if "published" in row else row["default"]
    return f"{rms:9.3f}/{median:.3f} ({other[0]:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", choices=KINDS, default=[])
    parser.add_argument("--minutes", type=float, default=9.0, help="CPU minutes of training for each")
    parser.add_argument("--folder", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 8, 10, 20])
    parser.add_argument("--starts", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        for kind in options.train:
            train(kind, options.minutes, options.folder)
        return
    results: dict[str, Any] = {}
    for kind in KINDS:
        if (options.folder / kind).is_dir():
            print(f"{kind}: rms/median (best published grid)", flush=True)
            model = load_model(options.folder / kind)
            results[kind] = measure(Case(model, options.starts), options.nfe)
    about = {"scoresde": scoresde.__version__, "torch": torch.__version__}
    settings = {"nfe": options.nfe, "starts": options.starts, "minutes": options.minutes, "chosen_on": ["vp-edm"]}
    write_json(RESULTS, {"versions": about, "settings": settings, "networks": results})


if __name__ == "__main__":
    main()
