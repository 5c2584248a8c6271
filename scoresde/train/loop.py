"""The training loop. Layer 4.

Every random number of step n comes from (seed, n, process), so nothing has to be stored to continue a run exactly: on
one CPU an interrupted and resumed run ends with the same parameters, bit for bit, as one that was left alone.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.checks import NonFiniteError
from scoresde.data import AUGMENTATION_DIM, Images, augmented, digits, load_images
from scoresde.likelihood import bits_from_nats, dequantize, elbo
from scoresde.losses import denoising_loss, mean_weight
from scoresde.models.base import ScoreModel
from scoresde.models.network import ScoreNet
from scoresde.models.quantized import QuantizedScoreNet
from scoresde.nets import LeanUNet
from scoresde.progress import bar
from scoresde.rng import derive
from scoresde.sde import SDES
from scoresde.store import check_writable, save_model
from scoresde.train import checkpoint
from scoresde.train.checkpoint import Progress
from scoresde.train.options import TrainOptions

LOG_EVERY = 25
NAN_PATIENCE = 10


class TrainingStopped(RuntimeError):
    """Training ended early; the message says why, what is saved and how to go on."""


class TrainingInterrupted(TrainingStopped):
    """A person stopped it."""


@dataclass
class Result:
    """A finished run: the averaged model (evaluation mode), its progress and curves, and its folder."""

    model: ScoreModel
    progress: Progress
    folder: Path


def load_splits(options: TrainOptions) -> tuple[Images, Images]:
    """(train, validation): the digits' own split, or a seeded one of any other data."""
    if options.data == "digits":
        images = digits("train"), digits("validation")
        if options.levels not in (None, images[0].levels):
            raise ValueError(f"the digits have {images[0].levels} levels, got levels={options.levels}.")
        return images
    if options.data.startswith("digits:"):
        raise ValueError(f"train on data=digits, which takes its own training split, not on {options.data!r}.")
    whole = load_images(options.data, options.levels)
    n = max(1, round(options.validation_fraction * len(whole)))
    if n >= len(whole):
        raise ValueError(f"{options.data} has {len(whole)} images: too few to hold {n} out for validation.")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(derive(options.seed, 0x59117)))
    parts = (order[n:], "train"), (order[:n], "validation")
    return tuple(Images(whole.values[rows], whole.levels, f"{whole.name}:{name}") for rows, name in parts)


def build_model(options: TrainOptions, images: Images) -> ScoreModel:
    """An untrained model for these images; its initial parameters depend on `options.seed` alone."""
    channels, *size = images.event_shape
    common = dict(sigma_data=options.sigma_data, event_shape=images.event_shape)
    quantized = options.parameterization == "levels"
    with _seeded(derive(options.seed, 0x1217)):
        net = LeanUNet(
            QuantizedScoreNet.input_channels(channels) if quantized else channels,
            channels * images.levels if quantized else channels,
            size,
            channels=options.channels,
            blocks=options.blocks,
            cond_dim=AUGMENTATION_DIM if options.augment else 0,
            dropout=options.dropout,
        )
    sde = SDES[options.sde](**options.sde_options)
    if quantized:
        ends = {} if options.log_snr_range is None else {"label_range": options.log_snr_range}
        return QuantizedScoreNet(net, sde, images.levels, **ends, **common)
    return ScoreNet(net, sde, options.parameterization, levels=images.levels, **common)


class _Objective(nn.Module):
    """The loss as a module, so that a distributed wrapper sees the forward pass."""

    def __init__(self, model: ScoreModel, options: TrainOptions):
        super().__init__()
        self.model = model
        self.kind = dict(
            weighting=options.weighting, time_sampling=options.time_sampling, log_snr_range=options.log_snr_range
        )
        scale = mean_weight(model.sde, sigma_data=model.sigma_data, **self.kind)
        self.scale = scale * math.prod(model.event_shape)

    def forward(self, x0: Tensor, cond: Tensor | None, generator: torch.Generator) -> Tensor:
        """Weighted mean of the squared noise error per dimension."""
        return denoising_loss(self.model, x0, seed=generator, cond=cond, **self.kind).mean() / self.scale


class _Batches:
    """Dequantized training batches: a function of the step alone."""

    def __init__(self, images: Images, options: TrainOptions, value_range: tuple[float, float]):
        self.values, self.levels, self.options, self.range = images.values, images.levels, options, value_range
        self.changed = augmented(images.values, images.levels, seed=options.seed) if options.augment else None

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """x0 (B, *) and augmentation labels (B, 8) or None."""
        size = self.options.batch_size
        k = self.values[torch.randint(len(self.values), (size,), generator=generator)]
        cond = None
        if self.changed is not None:
            values, labels = self.changed
            cond = torch.zeros(size, AUGMENTATION_DIM)
            rows = torch.rand(size, generator=generator) < self.options.augment
            chosen = torch.randint(len(values), (size,), generator=generator)
            k = torch.where(rows.reshape(-1, *(1,) * (k.dim() - 1)), values[chosen], k)
            cond = torch.where(rows[:, None], labels[chosen], cond)
        return dequantize(k, self.levels, self.range, torch.rand(k.shape, generator=generator)), cond


def train(
    options: TrainOptions,
    run: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: bool = False,
    on_evaluate: Callable[[ScoreModel, dict[str, float]], None] | None = None,
) -> Result:
    """Train a score network and leave the averaged model in `run/model`, checkpoints in `run/checkpoints`.

    Arguments: `device`, "auto", "cpu" or "cuda"; `resume`, continue from the newest readable checkpoint with the same
    options; `progress`, show a bar; `on_evaluate(model, record)`, called with the averaged model at each evaluation.

    Raises `ValueError` if `run` already holds checkpoints and `resume` is False, if it holds none and `resume` is True,
    or if the options differ from the checkpoint's (listing them); `PermissionError` if `run` cannot be written;
    `TrainingStopped` on an interrupt (after saving, saying how to go on) and when the loss is not finite ten steps in a
    row.
    """
    from accelerate import Accelerator

    run = Path(run)
    saved = _find(run, options, resume)
    train_images, validation = load_splits(options)
    check_writable(run / "checkpoints")
    accelerator = Accelerator(cpu=_use_cpu(device))
    model = build_model(options, train_images)
    if len(model.event_shape) == 3:
        model = model.to(memory_format=torch.channels_last)
    model.to(accelerator.device)
    average = build_model(options, train_images).to(accelerator.device).eval().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = _optimizer(model, options)
    state = Progress()
    if saved is not None:
        saved.restore(model, average, optimizer)
        state = saved.progress
    objective, optimizer = accelerator.prepare(_Objective(model, options), optimizer)
    batches = _Batches(train_images, options, model.value_range)
    losses: list[Tensor] = []
    bad_steps, saved_step = 0, -1
    main = accelerator.is_main_process
    show = progress and main

    def save() -> None:
        nonlocal saved_step
        if main and saved_step != state.step:
            checkpoint.save(run, model, average, _bare(optimizer), state, options.to_json())
            saved_step = state.step

    with (
        bar(options.steps, "training", "step", show, initial=state.step, leave=True) as ticks,
        _interruptible() as interrupted,
        _threads(options.threads),
    ):
        while (fraction := _fraction(state, options)) < 1.0:
            clock, cpu = time.perf_counter(), time.process_time()
            loss = _step(accelerator, objective, optimizer, batches, state.step, fraction, options)
            if loss is not None:
                _update_average(average, model, state.step, options.ema)
                losses.append(loss)
            bad_steps = 0 if loss is not None else bad_steps + 1
            state.step += 1
            state.seconds += time.perf_counter() - clock
            state.cpu_seconds += time.process_time() - cpu
            ticks.update()
            if bad_steps >= NAN_PATIENCE:
                what = (
                    f"the loss or its gradient was NaN or infinite {bad_steps} steps in a row, up to step {state.step}"
                )
                raise TrainingStopped(_diverged(what, run, options))
            last = _fraction(state, options) >= 1.0
            if losses and (state.step % LOG_EVERY == 0 or last):
                value = float(torch.stack(losses).mean())
                losses.clear()
                state.history.append({"step": state.step, "loss": value})
                ticks.set_postfix_str(f"loss {value:.4f}", refresh=False)
            if last or (state.step % options.evaluate_every == 0 and not bad_steps):
                try:
                    record = _evaluate(average, validation, state)
                except NonFiniteError as e:
                    what = f"the network returned NaN or infinity at the validation after step {state.step}"
                    raise TrainingStopped(_diverged(what, run, options)) from e
                state.history.append(record)
                if show:
                    bits, error = record["bits_per_dim"], record["stderr"]
                    ticks.write(f"step {state.step}: validation {bits:.3f} +- {error:.3f} bits/dim (ELBO)")
                if main and on_evaluate is not None:
                    on_evaluate(average, record)
            if last or (state.step % options.checkpoint_every == 0 and not bad_steps):
                save()
            if interrupted():
                save()
                raise TrainingInterrupted(
                    f"interrupted at step {state.step} of {options.steps}; saved in {run}. "
                    f"Go on with: scoresde train --resume true --out {run}"
                )
    if main:
        save_model(average, run / "model")
    return Result(average.eval(), state, run)


def _step(
    accelerator: Any,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: _Batches,
    step: int,
    fraction: float,
    options: TrainOptions,
) -> Tensor | None:
    """One optimisation step on the batch of `step`; its loss, or None where the gradient was not finite and nothing moved."""
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(step, fraction, options)
    seed = derive(options.seed, step, accelerator.process_index)
    x0, cond = batches.draw(torch.Generator().manual_seed(seed))
    x0, cond = x0.to(accelerator.device), None if cond is None else cond.to(accelerator.device)
    with _seeded(seed, accelerator.device):  # dropout draws from the global state, which is put back
        loss = objective(x0, cond, torch.Generator(accelerator.device).manual_seed(derive(seed, 1)))
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(objective.parameters(), options.gradient_clip)
    good = bool(torch.isfinite(norm))
    if good:
        optimizer.step()
    optimizer.zero_grad()
    return loss.detach() if good else None


def _diverged(what: str, run: Path, options: TrainOptions) -> str:
    found = checkpoint.folders(run)
    kept = f"the last good checkpoint is {found[0]}." if found else "no checkpoint was written yet."
    return f"{what}; {kept} Lower learning_rate (now {options.learning_rate:g}) or check the data."


def _find(run: Path, options: TrainOptions, resume: bool) -> checkpoint.Saved | None:
    """The checkpoint to go on from, after refusing what would lose or mix up a run."""
    existing = checkpoint.folders(run)
    if not resume:
        if existing or (run / "model").exists():
            raise ValueError(f"{run} already holds a training run; resume it (--resume true) or choose another --out.")
        return None
    saved, problems = checkpoint.read_latest(run)
    for text in problems:
        warnings.warn(text, stacklevel=3)
    if saved is None:
        raise ValueError(f"{run} holds no readable checkpoint to resume from. " + " ".join(problems))
    ours = options.to_json()
    different = [
        f"{k}: {saved.options.get(k)!r} in the checkpoint, {ours[k]!r} now"
        for k in ours
        if saved.options.get(k) != ours[k]
    ]
    if different:
        raise ValueError(
            f"cannot resume {run} with other options ({'; '.join(different)}). Resume with the run's own, or start a "
            "new run in another folder."
        )
    return saved


def _use_cpu(device: str) -> bool:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda for training, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=cpu or auto.")
    return device == "cpu"


def _optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW; biases, norms and other vectors are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.99), fused=True)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _fraction(state: Progress, options: TrainOptions) -> float:
    """How much of the run is done, by steps or, where that is further, by the clock."""
    by_clock = 0.0 if options.minutes is None else state.seconds / (60 * options.minutes)
    return max(state.step / options.steps, by_clock)


def _learning_rate(step: int, fraction: float, options: TrainOptions) -> float:
    """Linear warm-up, then half a cosine down to `final_learning_rate` of the peak."""
    warm = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    return options.learning_rate * warm * (options.final_learning_rate + (1 - options.final_learning_rate) * fall)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the parameters, with the usual warm-up (1 + n) / (10 + n) of its decay."""
    rate = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), rate)
    for kept, new in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(new)


def _evaluate(model: ScoreModel, images: Images, state: Progress) -> dict[str, float]:
    """Validation bits/dim by the variational bound, with the same noise at every evaluation."""
    device = next(model.parameters()).device
    noise = torch.Generator().manual_seed(0)
    x = dequantize(images.values, images.levels, model.value_range, torch.rand(images.values.shape, generator=noise))
    result = elbo(model, x.to(device), draws=16, seed=1)
    bits = bits_from_nats(result.value, math.prod(images.event_shape), images.levels, model.value_range)
    return {
        "step": state.step,
        "bits_per_dim": float(bits.mean()),
        "stderr": float(bits.std() / math.sqrt(len(images))),
        "seconds": state.seconds,
    }


@contextmanager
def _seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """The global generators at `seed` inside, as they were outside."""
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [g.get_state() for g in generators]
    try:
        for g in generators:
            g.manual_seed(seed)
        yield
    finally:
        for g, state in zip(generators, before, strict=True):
            g.set_state(state)


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Intra-operation CPU threads inside, as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a question that the loop asks between steps; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
