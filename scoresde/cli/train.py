"""`scoresde train`. Layer 5."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from scoresde.cli.report import bits_line, measure, training_record, write_metrics
from scoresde.jobs import launched
from scoresde.losses import TIME_SAMPLING, WEIGHTINGS
from scoresde.models.network import PARAMETERIZATIONS
from scoresde.sde import SDES

_CHOICES = ("levels", *PARAMETERIZATIONS)
if not TYPE_CHECKING:
    Parameterization = Literal[_CHOICES]
    Process = Literal[tuple(SDES)]
    Weighting = Literal[WEIGHTINGS]
    TimeSampling = Literal[TIME_SAMPLING]
else:  # a type checker does not follow computed choices
    Parameterization = str
    Process = str
    Weighting = str
    TimeSampling = str


def train(
    preset: Literal["demo", "digits", "digits-long"] | None = None,
    out: str | None = None,
    data: str | None = None,
    levels: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    parameterization: Parameterization | None = None,
    sigma_data: float | None = None,
    channels: tuple[int, ...] | None = None,
    blocks: tuple[int, ...] | None = None,
    dropout: float | None = None,
    augment: float | None = None,
    ema: float | None = None,
    sde: Process | None = None,
    weighting: Weighting | None = None,
    time_sampling: TimeSampling | None = None,
    seed: int | None = None,
    threads: int | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    score: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Train a score network on images and report its test bits/dim.

    Leaves the model in OUT/model, checkpoints in OUT/checkpoints and figures' numbers in OUT/metrics.json. Ctrl-C saves
    before it stops; go on with --resume true, which takes the run's own options. Several processes train one model together:
    torchrun --nproc_per_node 2 --no-python scoresde train ...

    Args:
        preset: Options to start from, chosen on the digits: demo takes 5 minutes on 2 cores, digits 20 and digits-long 60 CPU
            minutes. By default digits for the digits; for other data options are chosen that fit them, which is said.
        out: Folder of the run, by default runs/PRESET, or for other data runs/NAME with a name of them. It must not hold
            another run, unless you resume it.
        data: digits (scikit-learn's 8x8 handwritten digits), an .npz file, or a folder of images of one size.
        levels: Grey levels of the data, for .npz files (256 for 8-bit images).
        steps: Training steps.
        minutes: Upper bound on the minutes spent in training steps.
        batch_size: Images per step, for each process.
        learning_rate: Peak learning rate of AdamW.
        parameterization: What the network predicts; levels is the logits of each pixel's levels, for data of few.
        sigma_data: Scale of the data, which edm's parameterization and weighting assume.
        channels: Channels of the network at each resolution, the finest first, as [32,64]; each halves the sides.
        blocks: Blocks at each resolution, as [2,4].
        dropout: Share of the features that are dropped in training.
        augment: Share of each batch that is replaced by changed images, with labels that say how.
        ema: Decay of the averaged parameters, which are the ones that are saved.
        sde: The process, with its default options.
        weighting: Weight of the loss over time.
        time_sampling: How times are drawn; log-normal goes with edm's weighting.
        seed: Seed of everything random.
        threads: CPU threads of a training step.
        evaluate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        resume: Continue the run in OUT from its newest readable checkpoint.
        score: Compute exact test bits/dim at the end (digits only).
        device: Where to train.
    """
    from scoresde.train import TRAIN_PRESETS, TrainOptions, options_for, options_of
    from scoresde.train import train as run_training

    given = {
        name: value for name, value in locals().items() if name in TrainOptions.__annotations__ and value is not None
    }
    if sde is not None:
        given["sde_options"] = {}
    rank = launched()[0]
    fitted = preset is None and data not in (None, "digits")
    preset = None if fitted else preset or "digits"
    out = f"runs/{preset or Path(cast(str, data)).stem}" if out is None else out
    if resume:
        start = TrainOptions.from_json(options_of(Path(out)))
        options = dataclasses.replace(
            start, **{k: v for k, v in given.items() if k != "sde_options" or sde != start.sde}
        )
    elif fitted:
        from scoresde.data import load_images

        options, why = options_for(load_images(cast(str, data), levels), **given)
        if rank == 0:
            print(why, flush=True)
    else:
        options = dataclasses.replace(TRAIN_PRESETS[cast(str, preset)], **given)
    result = run_training(options, out, device=device, resume=resume, progress=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if rank:
        return
    metrics = {"command": "train", "preset": None if resume else preset, **training_record(result, options)}
    print(f"trained {result.progress.step} steps in {result.progress.seconds / 60:.1f} min; model in {out}/model")
    if score and options.data == "digits":
        from scoresde.data import digits

        metrics["test"] = measure(result.model, digits("test"), seed=options.seed)
        print(bits_line(metrics["test"]))
    write_metrics(Path(out), metrics)
    print(f"metrics: {out}/metrics.json")
