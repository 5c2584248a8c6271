"""What each command does, with plain arguments: the command line is read off these signatures and docstrings. Layer 5."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from scoresde._version import __version__
from scoresde.cli.report import bits_line
from scoresde.jobs import RESULT_FILE, BitsJob, share_of
from scoresde.models.base import ScoreModel
from scoresde.samplers import FewStep, Sampler
from scoresde.samplers.registry import METHODS

# the names of `scoresde.sampling.METHODS`, as choices on the command line, and what `scoresde tune` left beside the model
_CHOICES = ("tuned", *METHODS)
if not TYPE_CHECKING:
    Method = Literal[_CHOICES]
else:  # a type checker does not follow computed choices
    Method = str
CHUNK = 256
DEVICES = ("cpu", "cuda", "mps", "xpu")
MAX_STEPS = 1_000_000


def pick_device(device: str) -> torch.device:
    """The torch device of a name; "auto" takes CUDA where there is one. A launcher's process takes the CUDA device of its
    LOCAL_RANK. `ValueError` for a name that is none, or a device that torch cannot use here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as e:
        raise ValueError(f"unknown device {device!r}; use auto, cpu or cuda.") from e
    if chosen.type not in DEVICES:
        raise ValueError(f"device {device!r} cannot compute a sample; use auto or one of {', '.join(DEVICES)}.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees none; use --device cpu or auto.")
    if chosen == torch.device("cuda") and os.environ.get("LOCAL_RANK", "").isdigit():
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices.")
    if chosen.type not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=chosen)
        except Exception as e:  # of whatever kind: torch's backends differ
            reason = "".join(str(e).strip().splitlines()[:1])
            raise ValueError(f"torch cannot use device {device!r} here ({reason}); use --device cpu.") from e
    return chosen


def sample(
    model: str,
    out: str = "samples",
    n: int = 64,
    method: Method = "pc",
    steps: int | None = None,
    nfe: int | None = None,
    seed: int = 0,
    config: str | None = None,
    label: int | None = None,
    device: str = "auto",
) -> None:
    """Draw images from a trained model, as a PNG grid and an .npz file.

    Image i depends on (seed, i) alone, not on how many are drawn.

    Args:
        model: A model's folder or file, a training run's folder, a checkpoint of score_sde_pytorch, diffusers or EDM, or the name
            of one on the Hugging Face hub.
        out: Folder for samples.png and samples.npz (integer levels, named "images").
        n: How many images.
        method: Sampling method; pc is the predictor-corrector, ode the adaptive probability flow, auto the choice for few
            network evaluations, tuned what `scoresde tune` learned (with --nfe where it learned several).
        steps: Steps of the method; its own default if not given.
        nfe: Network evaluations in all, in place of steps.
        seed: Seed.
        config: Options of a checkpoint that does not carry its own: a JSON or YAML file, or a published name such as
            vp/cifar10_ddpmpp_continuous.
        label: Class of the images, for class-conditional networks; no class if not given.
        device: auto, cpu or cuda.
    """
    import numpy as np

    from scoresde import checks, load, plots
    from scoresde.store import check_writable, write_atomic

    checks.positive_int(n, "n")
    for name, value in (("steps", steps), ("nfe", nfe)):
        if value is not None and checks.positive_int(value, name) > MAX_STEPS:
            raise ValueError(f"{name} must be at most {MAX_STEPS:,}, got {value}.")
    net = load(model, config=config).to(pick_device(device))
    if net.event_shape is None:
        raise ValueError(
            f"{model} does not say what shape its images have; it cannot be sampled from the command line."
        )
    folder = Path(out)
    check_writable(folder)
    chosen = tuned_sampler(model, nfe) if method == "tuned" else method
    k = draw_images(net, n, chosen, steps, seed, nfe, label=label)
    array = k.numpy() if net.levels is None or net.levels > 256 else k.to(torch.uint8).numpy()

    picture = None
    if len(net.event_shape) == 3 and net.event_shape[0] in (1, 3):
        low, high = (0, net.levels - 1) if net.levels else net.value_range
        side = math.ceil(math.sqrt(min(n, 256)))
        picture = plots.sample_grids({f"{method}, seed {seed}": k[:256]}, columns=side, low=low, high=high)

    def write(path: Path) -> None:
        with open(path, "wb") as f:
            np.savez_compressed(f, images=array)

    draft = folder / "samples.png.part"
    try:  # both files or neither
        if picture is not None:
            write_atomic(draft, lambda p: plots.save(picture, p))
        write_atomic(folder / "samples.npz", write)
        if picture is not None:
            os.replace(draft, folder / "samples.png")
    finally:
        draft.unlink(missing_ok=True)
    print(f"{n} images: {folder / 'samples.npz'}")
    if picture is not None:
        print(f"grid: {folder / 'samples.png'}")


def tune(
    model: str,
    nfe: int = 8,
    starts: int = 256,
    iterations: int = 8,
    teacher_nfe: int = 100,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Learn a sampler with few network evaluations on a trained model, and leave it beside the model.

    Use it with: scoresde sample MODEL --method tuned

    Args:
        model: A model's folder or file, or a training run's folder.
        nfe: Network evaluations of the sampler.
        starts: Trajectories to learn from; half as many again are held out for the figures.
        iterations: Iterations of the fit.
        teacher_nfe: Network evaluations of the reference trajectories.
        seed: Seed of the starts.
        device: auto, cpu or cuda.
    """
    from scoresde import load
    from scoresde import tune as learn
    from scoresde.store import check_writable, model_folder, save_sampler

    folder = model_folder(model)
    check_writable(folder)
    net = load(model).to(pick_device(device))
    sampler = learn(
        net,
        nfe,
        starts=starts,
        held_out=max(8, starts // 2),
        iterations=iterations,
        teacher_nfe=teacher_nfe,
        jacobian_starts=max(8, min(128, starts // 2)),
        seed=seed,
        progress=True,
    )
    print(sampler.report)
    if sampler.report is not None and sampler.report.gained:
        print(f"saved: {save_sampler(sampler, folder)}")
    else:
        print("nothing saved: use --method auto.")


def tuned_sampler(model: str, nfe: int | None) -> FewStep:
    """The sampler that `scoresde tune` left beside the model; `ValueError` where there is none, or nfe does not say which."""
    from scoresde.store import load_samplers

    found = load_samplers(model)
    if nfe is None and len(found) == 1:
        return next(iter(found.values()))
    if nfe not in found:
        there = f"there are samplers of {', '.join(map(str, found))} evaluations" if found else "there is none yet"
        raise ValueError(
            f"no tuned sampler{'' if nfe is None else f' of {nfe} evaluations'} beside {model}: {there}; "
            "make one with: scoresde tune MODEL --nfe N, or choose one with --nfe."
        )
    return found[nfe]


def bpd(
    model: str,
    data: str = "digits:test",
    levels: int | None = None,
    probes: int = 8,
    rtol: float = 1e-4,
    dequantization: Literal["uniform", "truncated-normal"] = "uniform",
    samples: int = 1,
    draws: int = 1,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    out: str | None = None,
    shard: str | None = None,
    config: str | None = None,
    device: str = "auto",
) -> None:
    """Exact bits/dim of images under a model, by the probability-flow ODE.

    Every finished batch is stored in OUT. After an interruption of any kind, the same command goes on where it stopped.
    Under torchrun or accelerate launch, or with --shard, each process takes its part of the batches, and whoever finds
    all of them in OUT writes OUT/result.json and OUT/images.npz (bits/dim of each image, in the order of the data).

    Args:
        model: A model's folder or file, a training run's folder, a checkpoint of score_sde_pytorch, diffusers or EDM, or the name
            of one on the Hugging Face hub.
        data: digits:test (or :train, :validation), an .npz file of integers, or a folder of images.
        levels: Grey levels of the data, for .npz files; the model's if it says.
        probes: Orthogonal probes per image and place of the trace estimate, in two independent halves that give its standard error
            (an odd number has none); 0 takes the exact trace, which is slow.
        rtol: Tolerance of the solver.
        dequantization: uniform, for models of dequantized images; truncated-normal, for models of the levels' centres.
        samples: Points per bound, combined by importance weighting; more of them tighten it.
        draws: Independent bounds per image, averaged.
        limit: Use only the first so many images.
        seed: Seed of the dequantization noise and of the probes; image i draws from (seed, i).
        batch_size: Images at a time, as memory allows; it changes the result by rounding only.
        out: Folder of the results, runs/bpd-CODE by default, with a CODE of the model's weights, the data and the settings.
        shard: Compute only this part of the batches, as 2/8 (the second of eight); the processes need share nothing but OUT.
        config: Options of a checkpoint that does not carry its own: a JSON or YAML file, or a published name such as
            vp/cifar10_ddpmpp_continuous.
        device: auto, cpu or cuda; with several processes on a machine, each takes its own CUDA device.
    """
    from scoresde import checks, load
    from scoresde.data import Images, load_images

    share = share_of(shard)
    net = load(model, config=config)
    images = load_images(data, net.levels if levels is None and ".npz" in data else levels)
    if limit is not None:
        checks.positive_int(limit, "limit")
        images = Images(images.values[:limit], images.levels, images.name)
    job = BitsJob(
        net.to(pick_device(device)),
        images,
        out,
        estimator=dict(probes=probes, rtol=rtol),
        dequantization=dict(dequantization=dequantization, samples=samples, draws=draws),
        seed=seed,
        batch_size=batch_size,
    )
    job.run(share)
    found = job.result({"model": str(model), "data": data})
    print(job.missing(share) if found is None else f"{images.name}: {bits_line(found)}; {job.folder / RESULT_FILE}")


def convert(model: str, out: str, config: str | None = None) -> None:
    """Write any model that can be loaded as one of this package, safetensors and JSON, so that it can be tuned or shared.

    Args:
        model: As for sample.
        out: Folder for model.safetensors and config.json; it must not hold a model yet.
        config: Options of a checkpoint that does not carry its own: a JSON or YAML file, or a published name such as
            vp/cifar10_ddpmpp_continuous.
    """
    import tempfile

    from scoresde import load, save_pretrained
    from scoresde.store import CONFIG_FILE, MODEL_FILE, check_writable

    folder = Path(out)
    if (folder / MODEL_FILE).exists() or (folder / CONFIG_FILE).exists():
        raise FileExistsError(f"{folder} holds a model already; choose another folder.")
    check_writable(folder)
    net = load(model, config=config)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".convert-") as draft:  # all files of the model or none
        for file in save_pretrained(net, draft).iterdir():
            os.replace(file, folder / file.name)
    print(f"model: {folder}")


def info(model: str | None = None, config: str | None = None) -> None:
    """Say what is installed, or what a model is.

    Args:
        model: As for sample. Without one: versions, devices, methods and SDEs.
        config: Options of a checkpoint that does not carry its own: a JSON or YAML file, or a published name such as
            vp/cifar10_ddpmpp_continuous.
    """
    from scoresde import METHODS, load
    from scoresde.sde import SDES
    from scoresde.store import describe

    if model is None and config is not None:
        raise ValueError(f"config {config!r} says how to read a model; name the model too, with --model.")
    if model is None:
        print(f"scoresde {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        print(f"CUDA device: {cuda}\nmethods: {', '.join(METHODS)}\nSDEs: {', '.join(SDES)}")
        return
    net = load(model, config=config)
    print(json.dumps({"version": __version__, "model": describe(net)}, indent=2))
    print(f"parameters: {sum(p.numel() for p in net.parameters()):,}")


def draw_images(
    net: ScoreModel,
    n: int,
    method: str | Sampler,
    steps: int | None,
    seed: int,
    nfe: int | None = None,
    progress: bool = True,
    label: int | None = None,
) -> torch.Tensor:
    """n images on the CPU, image i from (seed, i), as integer levels where the model has them; `label` is their class."""
    from scoresde import sample as draw
    from scoresde.likelihood import quantize
    from scoresde.modes import device_of
    from scoresde.rng import spawn

    parts = []
    for start in range(0, n, CHUNK):
        seeds = spawn(seed, min(CHUNK, n - start), start)
        shape = (len(seeds), *cast(tuple[int, ...], net.event_shape))
        cond = None if label is None else torch.full(shape[:1], label, device=device_of(net))
        x = draw(net, shape, method=method, steps=steps, nfe=nfe, seed=seeds, cond=cond, progress=progress)
        parts.append(cast(torch.Tensor, x).cpu())
    x = torch.cat(parts)
    return x if net.levels is None else quantize(x, net.levels, net.value_range)
