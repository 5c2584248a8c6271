"""`scoresde demo`: the whole job on real images, in one command. Layer 5."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scoresde.cli.bpd import bits_line, check_probes, measure
from scoresde.cli.commands import draw_images, pick_device, training_record, write_metrics

# the steps keep the demo short; each method's own default is what `scoresde sample` uses
DEMO_METHODS = {"pc": 150, "ode": None, "euler": 250, "ancestral": 250, "ddim": 40}
PATH_TIMES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def demo(
    out: str = "runs/demo",
    minutes: float = 5.0,
    images: int = 128,
    probes: int = 8,
    seed: int = 0,
    overwrite: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Train on real handwritten digits, sample with five methods, and measure exact test bits/dim.

    Args:
        out: Folder for the model, metrics.json and the figures.
        minutes: Minutes of training at most.
        images: Samples per method.
        probes: Orthogonal probes per test image in the trace estimate; 0 takes the exact trace.
        seed: Seed of everything random.
        overwrite: Move an earlier demo from OUT to OUT.old instead of refusing.
        device: Where to compute.
    """
    from scoresde import checks, plots
    from scoresde.data import digits
    from scoresde.store import check_writable
    from scoresde.train import TRAIN_PRESETS, train

    checks.positive_int(images, "images")
    check_probes(probes)
    start = time.perf_counter()
    folder = Path(out)
    check_writable(folder.absolute().parent)
    if overwrite:
        _set_aside(folder)
    options = dataclasses.replace(TRAIN_PRESETS["demo"], minutes=minutes, seed=seed)
    train_images, test_images = digits("train"), digits("test")
    print(
        f"1/4  Training a score network on {len(train_images)} handwritten digits (8x8, {train_images.levels} grey levels), "
        f"at most {minutes:g} minutes.",
        flush=True,
    )
    shown: list[int] = []

    def preview(model, record) -> None:
        if not shown:
            shown.append(record["step"])
            print(f"     first samples, {time.perf_counter() - start:.0f} s after the start:", flush=True)
            print(_as_text(draw_images(model, 8, "ddim", 20, seed, progress=False)), flush=True)

    result = train(options, folder, device=device, progress=True, on_evaluate=preview)
    model = result.model.to(pick_device(device))

    print(f"2/4  Drawing {images} images with each of {', '.join(DEMO_METHODS)}.", flush=True)
    metrics = {"command": "demo", **training_record(result, options), "samples": {}}
    reference = test_images.values.float()
    floor = _distance(train_images.values[:images].float(), reference)
    grids = {"real (test)": test_images.values[:64]}
    for method, steps in DEMO_METHODS.items():
        clock = time.perf_counter()
        levels = draw_images(model, images, method, steps, seed)
        grids[method] = levels[:64]
        metrics["samples"][method] = {
            "steps": steps,
            "seconds": time.perf_counter() - clock,
            "sliced_wasserstein": _distance(levels.float(), reference),
        }
    metrics["samples"]["real (train)"] = {"sliced_wasserstein": floor}

    print(f"3/4  Exact bits/dim of the {len(test_images)} test images, by the probability-flow ODE.", flush=True)
    metrics["test"] = measure(model, test_images, probes=probes, seed=seed)
    metrics["seconds"] = time.perf_counter() - start

    print("4/4  Figures.\n", flush=True)
    write_metrics(folder, metrics)
    bits = metrics["test"]["bits_per_dim"]
    files = [
        plots.save(plots.training_curves(result.progress.history, bits), folder / "curves.png"),
        plots.save(plots.sample_grids(grids, high=test_images.levels - 1), folder / "samples.png"),
        plots.save(_path_figure(model, seed), folder / "reverse_path.png"),
    ]
    _report(metrics, folder, files)


def _distance(x: Tensor, y: Tensor) -> float:
    """Sliced Wasserstein distance in grey levels."""
    from scoresde.metrics import sliced_wasserstein

    return sliced_wasserstein(x, y)


def _path_figure(model, seed: int):
    """Six samples on their way from noise to digits, by DDIM."""
    from scoresde import plots, sample
    from scoresde.samplers import Trajectory

    trajectory = Trajectory()
    times = torch.linspace(1, model.sde.t_min, 101, dtype=torch.float64)
    shape = (6, *model.event_shape)
    sample(model, shape, method="ddim", grid=times, seed=seed, trajectory=trajectory)
    at = [min(range(101), key=lambda i: abs(trajectory.times[i] - t)) for t in PATH_TIMES] + [len(trajectory.times) - 1]
    low, high = model.value_range
    return plots.reverse_path([trajectory.times[i] for i in at], [trajectory.states[i] for i in at], low=low, high=high)


def _as_text(levels: Tensor) -> str:
    """A row of 8x8 images in block characters, dark on light."""
    shades = " .:-=+*#%@"
    top = int(levels.max()) or 1
    lines = []
    for row in range(levels.shape[2]):
        cells = ["".join(2 * shades[int(v) * (len(shades) - 1) // top] for v in image[0, row]) for image in levels]
        lines.append("     " + "  ".join(cells))
    return "\n".join(lines)


def _report(metrics: dict, folder: Path, files: list[Path]) -> None:
    """The table at the end, and where everything is."""
    training, test = metrics["training"], metrics["test"]
    print(
        f"training    {training['steps']} steps, {training['seconds'] / 60:.1f} min, {training['parameters']:,} parameters"
    )
    print(f"test        {bits_line(test)}\n")
    print(f"{'samples':14s}{'steps':>7s}{'seconds':>9s}{'sliced W2 to test images':>27s}")
    for name, m in metrics["samples"].items():
        steps, seconds = m.get("steps"), m.get("seconds")
        print(
            f"{name:14s}{'adaptive' if steps is None and seconds else steps or '':>8}"
            f"{'' if seconds is None else f'{seconds:.1f}':>8s}{m['sliced_wasserstein']:>19.3f} levels"
        )
    print("\nfiles")
    for path in (folder / "model", folder / "metrics.json", *files):
        print(f"  {path}")
    print(f"all in {metrics['seconds'] / 60:.1f} min")


def _set_aside(folder: Path) -> None:
    """Move an earlier demo to FOLDER.old, in place of the one that may be there."""
    import shutil

    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
