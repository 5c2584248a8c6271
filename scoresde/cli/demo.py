"""`scoresde demo`: the whole job on real images, in one command. Layer 5."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from scoresde._version import __version__
from scoresde.cli.commands import draw_images, pick_device
from scoresde.cli.report import bits_line, measure, training_record, write_metrics
from scoresde.models.base import ScoreModel

# the steps keep the demo short; each method's own default is what `scoresde sample` uses
DEMO_METHODS = {"pc": 150, "ode": None, "euler": 250, "ancestral": 250, "ddim": 40}
MARKER = "scoresde-demo.json"
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
        overwrite: Move an earlier demo from OUT to OUT.old (or OUT.old-2, ...) instead of refusing. Nothing is deleted.
        device: Where to compute.
    """
    from scoresde import checks, plots
    from scoresde.data import digits
    from scoresde.jobs import check_probes
    from scoresde.store import check_writable, write_json
    from scoresde.train import TRAIN_PRESETS, train

    checks.positive_int(images, "images")
    check_probes(probes)
    options = dataclasses.replace(TRAIN_PRESETS["demo"], minutes=minutes, seed=seed)
    pick_device(device)
    start = time.perf_counter()
    folder = Path(out)
    train_images, test_images = digits("train"), digits("test")
    check_writable(folder.absolute().parent)
    if overwrite:
        _set_aside(folder)
    if not folder.exists() or not any(folder.iterdir()):
        write_json(folder / MARKER, {"kind": "demo", "version": __version__})
    print(
        f"1/4  Training a score network on {len(train_images)} handwritten digits (8x8, {train_images.levels} grey levels), "
        f"at most {minutes:g} minutes.",
        flush=True,
    )
    shown: list[float] = []

    def preview(model: ScoreModel, record: dict[str, float]) -> None:
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


def _path_figure(model: ScoreModel, seed: int) -> Any:
    """Six samples on their way from noise to digits, by DDIM."""
    from scoresde import plots, sample
    from scoresde.samplers import Trajectory

    trajectory = Trajectory()
    times = torch.linspace(1, model.sde.t_min, 101, dtype=torch.float64)
    shape = (6, *cast(tuple[int, ...], model.event_shape))
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
    """Move an earlier demo to FOLDER.old, or FOLDER.old-2 and so on where that is taken. `ValueError` for a folder that no demo
    wrote, or that a run is being written into."""
    from scoresde.jobs import check_free

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not _is_demo(folder):
        raise ValueError(f"{folder} was not written by scoresde demo, so it is left alone; choose another --out.")
    check_free(folder)
    names = (folder.with_name(f"{folder.name}.old{'' if i == 1 else f'-{i}'}") for i in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    folder.rename(aside)
    print(f"the earlier demo is in {aside} now.", flush=True)


def _is_demo(folder: Path) -> bool:
    """Whether `demo` wrote the folder: by its marker, or by the metrics of an earlier version's."""
    for name, key in ((MARKER, "kind"), ("metrics.json", "command")):
        try:
            if json.loads((folder / name).read_text())[key] == "demo":
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False
