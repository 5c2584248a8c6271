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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from scoresde.checks import NonFiniteError
from scoresde.data import AUGMENTATION_DIM, Images, augmented
from scoresde.jobs import locked
from scoresde.likelihood import bits_from_nats, dequantize, elbo
from scoresde.losses import denoising_loss, mean_weight
from scoresde.models.base import ScoreModel
from scoresde.progress import bar
from scoresde.rng import derive
from scoresde.store import check_writable
from scoresde.train import checkpoint, processes
from scoresde.train.checkpoint import Progress
from scoresde.train.options import TrainOptions
from scoresde.train.setup import build_model, build_optimizer, digest_of, load_splits, seeded

LOG_EVERY = 25
NAN_PATIENCE = 10
VALIDATION = 512  # images that an evaluation looks at, and about how often it looks at images in all
VALIDATION_DRAWS = 3200


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


class _Objective(nn.Module):
    """The loss as a module, so that a distributed wrapper sees the forward pass."""

    def __init__(self, model: ScoreModel, options: TrainOptions):
        super().__init__()
        self.model = model
        self.kind: dict[str, Any] = dict(
            weighting=options.weighting, time_sampling=options.time_sampling, log_snr_range=options.log_snr_range
        )
        scale = mean_weight(model.sde, sigma_data=model.sigma_data, **self.kind)
        self.scale = scale * math.prod(cast(tuple[int, ...], model.event_shape))

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

    Under a launcher (torchrun) every process calls this alike: each draws batches of its own, gradients are averaged, and the
    first of them holds the folder and writes.

    Raises `ValueError` if `run` already holds checkpoints and `resume` is False, if it holds none and `resume` is True,
    if another process holds it, or if the options, the data or the number of processes differ from the checkpoint's (listing
    them); `PermissionError` if `run` cannot be written; `OSError` naming the checkpoint that is left where a later one cannot
    be; `TrainingStopped` on an interrupt (after saving, saying how to go on) and when the loss is not finite ten steps in a row.
    """
    if not isinstance(options, TrainOptions):
        raise TypeError(f"options must be TrainOptions, got {type(options).__name__}.")
    run = Path(run)
    _check_folder(run, resume)
    accelerator = processes.start(device)
    main = accelerator.is_main_process
    with ExitStack() as held:
        with processes.together(accelerator):
            splits = load_splits(options)
            facts = {
                "data_sha256": digest_of(splits),
                "processes": accelerator.num_processes,
                "mixed_precision": accelerator.mixed_precision,
            }
            if main:
                check_writable(run)
                held.enter_context(locked(run))
            _check_folder(run, resume)  # once more: until now another process may have had it
            saved = _read(run, options, facts) if resume else None
        return _run(accelerator, options, run, splits, facts, saved, progress and main, on_evaluate)


def _run(
    accelerator: Any,
    options: TrainOptions,
    run: Path,
    splits: tuple[Images, Images],
    facts: dict[str, Any],
    saved: checkpoint.Saved | None,
    show: bool,
    on_evaluate: Callable[[ScoreModel, dict[str, float]], None] | None,
) -> Result:
    """The loop itself, in a folder that is ours."""
    train_images, validation = splits
    model = build_model(options, train_images)
    if len(train_images.event_shape) == 3:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stub
    model.to(accelerator.device)
    average = build_model(options, train_images).to(accelerator.device).eval().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = build_optimizer(model, options)
    state = Progress()
    if saved is not None:
        saved.restore(model, average, optimizer)
        state = saved.progress
    objective, optimizer = accelerator.prepare(_Objective(model, options), optimizer)
    batches = _Batches(train_images, options, model.value_range)
    losses: list[Tensor] = []
    bad_steps, saved_step = 0, -1
    main = accelerator.is_main_process

    def save() -> None:
        nonlocal saved_step
        if main and saved_step != state.step:
            try:
                checkpoint.save(run, model, average, _bare(optimizer), state, options.to_json(), facts)
            except OSError as e:
                raise OSError(f"step {state.step} could not be saved: {e}; {_kept(run)}") from e
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
            # what decides over the next step must be the same everywhere
            state.seconds, stop = processes.largest(accelerator, state.seconds, float(interrupted()))
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
                (stop,) = processes.largest(accelerator, float(stop or interrupted()))
            if last or (state.step % options.checkpoint_every == 0 and not bad_steps):
                save()
            if stop:
                save()
                raise TrainingInterrupted(
                    f"interrupted at step {state.step} of {options.steps}; saved in {run}. Go on with: "
                    f"{_launcher(facts['processes'])}scoresde train --resume true --out {run}"
                )
    with processes.together(accelerator):
        if main:
            checkpoint.save_final(average, run)
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
    with seeded(seed, accelerator.device):  # dropout draws from the global state, which is put back
        loss = objective(x0, cond, torch.Generator(accelerator.device).manual_seed(derive(seed, 1)))
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(objective.parameters(), options.gradient_clip)
    good = bool(torch.isfinite(norm))
    if good:
        optimizer.step()
    optimizer.zero_grad()
    return loss.detach() if good else None


def _diverged(what: str, run: Path, options: TrainOptions) -> str:
    return f"{what}; {_kept(run)} Lower learning_rate (now {options.learning_rate:g}) or check the data."


def _kept(run: Path) -> str:
    found = checkpoint.folders(run)
    return f"the last good checkpoint is {found[0]}." if found else "no checkpoint was written yet."


def _launcher(count: int) -> str:
    """What a command for so many processes begins with."""
    return "" if count == 1 else f"torchrun --nproc_per_node {count} --no-python "


def _check_folder(run: Path, resume: bool) -> None:
    """`ValueError` where a run would be lost, or there is none to resume."""
    existing = checkpoint.folders(run)
    if not resume and (existing or (run / "model").exists()):
        raise ValueError(f"{run} already holds a training run; resume it (--resume true) or choose another --out.")
    if resume and not existing:
        raise ValueError(f"{run} holds no readable checkpoint to resume from.")


def _read(run: Path, options: TrainOptions, facts: dict[str, Any]) -> checkpoint.Saved:
    """The checkpoint to go on from. `ValueError` where its options or facts are not these: the run would become another."""
    saved, problems = checkpoint.read_latest(run)
    for text in problems:
        warnings.warn(text, stacklevel=4)
    if saved is None:
        raise ValueError(f"{run} holds no readable checkpoint to resume from. " + " ".join(problems))
    there, ours = TrainOptions.from_json(saved.options).to_json(), options.to_json()
    different = [f"{k}: {there[k]!r} in the checkpoint, {ours[k]!r} now" for k in ours if there[k] != ours[k]]
    if different:
        raise ValueError(
            f"cannot resume {run} with other options ({'; '.join(different)}). Resume with the run's own, or start a "
            "new run in another folder."
        )
    before = {**facts, **saved.facts}
    if before["data_sha256"] != facts["data_sha256"]:
        raise ValueError(
            f"cannot resume {run}: the images of {options.data} are not those that it was trained on (their digest is "
            f"{facts['data_sha256'][:12]}..., it was {before['data_sha256'][:12]}...). Bring them back, or start a new run in "
            "another folder."
        )
    if before["processes"] != facts["processes"]:
        count = before["processes"]
        raise ValueError(
            f"cannot resume {run} with {facts['processes']} process{'es' * (facts['processes'] > 1)}: it was trained with {count}, "
            f"which draw other batches. Go on with: {_launcher(count)}scoresde train --resume true --out {run}"
        )
    if before["mixed_precision"] != facts["mixed_precision"]:
        raise ValueError(
            f"cannot resume {run} in mixed precision {facts['mixed_precision']!r}: it was trained in "
            f"{before['mixed_precision']!r} (ACCELERATE_MIXED_PRECISION)."
        )
    return saved


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
    """Validation bits/dim by the variational bound over the first `VALIDATION` images, with the same noise every time."""
    device = next(model.parameters()).device
    noise = torch.Generator().manual_seed(0)
    k = images.values[:VALIDATION]
    draws = max(1, min(16, VALIDATION_DRAWS // len(k)))
    x = dequantize(k, images.levels, model.value_range, torch.rand(k.shape, generator=noise))
    nats = [
        elbo(model, part.to(device), draws=draws, seed=derive(1, i) if i else 1).value
        for i, part in enumerate(x.split(VALIDATION // 2))
    ]
    bits = bits_from_nats(torch.cat(nats), math.prod(images.event_shape), images.levels, model.value_range)
    return {
        "step": state.step,
        "bits_per_dim": float(bits.mean()),
        "stderr": float(bits.std() / math.sqrt(len(bits))),
        "seconds": state.seconds,
    }


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
