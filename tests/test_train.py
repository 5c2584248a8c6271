"""Training: what a run leaves behind, exact resumption after an interrupt or damage, and every way it can stop."""

import dataclasses
import json
import math
import os
import random
import signal
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from scoresde import QuantizedScoreNet, ScoreNet, load, sample
from scoresde.data import Images
from scoresde.store import read_tensors
from scoresde.train import (
    TRAIN_PRESETS,
    TrainingStopped,
    TrainOptions,
    build_model,
    load_splits,
    loop,
    options_for,
    train,
)
from scoresde.train.checkpoint import folders, read_latest
from scoresde.train.setup import mean_of

SIZE = 8


@pytest.fixture(scope="session")
def pixels_path(tmp_path_factory):
    """60 smooth 4 x 4 images of 5 levels in an .npz file."""
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(4), np.arange(4)) / 6
    images = np.clip(np.rint(4 * np.abs(rng.uniform(-1, 1, (60, 1, 1)) + ramp)), 0, 4).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "pixels.npz"
    np.savez(path, images=images)
    return path


@pytest.fixture
def options(pixels_path):
    """A run of 12 steps of a tiny network."""
    return dataclasses.replace(
        TRAIN_PRESETS["demo"],
        data=str(pixels_path),
        levels=5,
        channels=(8, 16),
        blocks=(1, 1),
        batch_size=SIZE,
        steps=12,
        minutes=None,
        evaluate_every=6,
        checkpoint_every=4,
        augment=0.3,
        warmup=4,
    )


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same_run(a, b):
    """Two run folders with the same raw parameters, moments, averages and validation curve, bit for bit."""
    for name in ("training.safetensors", "model.safetensors"):
        one, two = (read_tensors(folders(f)[0] / name)[0] for f in (a, b))
        assert one.keys() == two.keys()
        for k in one:
            assert torch.equal(one[k], two[k]), k
    assert torch.equal(parameters(load(a)), parameters(load(b)))
    # the mean loss since the last record is not: it starts anew when a run is resumed
    curves = [
        [(r["step"], r["bits_per_dim"], r["stderr"]) for r in read_latest(f)[0].progress.history if "stderr" in r]
        for f in (a, b)
    ]
    assert curves[0] == curves[1]


def interrupt_at(step):
    """An on_evaluate that presses Ctrl-C at the given step."""

    def press(model, record):
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return press


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# -- a run that goes well --------------------------------------------------------------------------------------------


def test_a_run_leaves_model_checkpoints_and_history(options, tmp_path):
    """The averaged model loads and samples; the two newest checkpoints stay; the records are complete."""
    seen = []
    result = train(options, tmp_path / "run", on_evaluate=lambda model, record: seen.append(record))
    assert result.folder == tmp_path / "run"
    assert [f.name for f in folders(tmp_path / "run")] == ["step-00000012", "step-00000008"]
    assert sorted(os.listdir(tmp_path / "run" / "model")) == ["config.json", "model.safetensors"]
    loaded = load(tmp_path / "run")
    assert isinstance(loaded, QuantizedScoreNet)
    assert torch.equal(parameters(loaded), parameters(result.model))
    assert (loaded.levels, loaded.event_shape) == (5, (1, 4, 4))
    assert not result.model.training
    assert result.progress.step == 12
    history = result.progress.history
    assert [r["step"] for r in history if "bits_per_dim" in r] == [6, 12] == [r["step"] for r in seen]
    assert [r["step"] for r in history if "loss" in r] == [12]
    assert all(math.isfinite(v) for r in history for v in r.values())
    meta = json.loads((folders(tmp_path / "run")[0] / "training.json").read_text())
    assert TrainOptions.from_json(meta["options"]) == options
    assert tuple(sample(loaded, (2, 1, 4, 4), method="ddim", steps=3, seed=0).shape) == (2, 1, 4, 4)
    average, raw = read_tensors(folders(tmp_path / "run")[0] / "model.safetensors")[0], read_latest(tmp_path / "run")[0]
    assert any(not torch.equal(average[k], raw.tensors[f"model.{k}"]) for k in average)  # it is an average


def test_training_learns(options, tmp_path):
    """80 steps bring the validation bits/dim well below the log2(5) of knowing nothing."""
    long = dataclasses.replace(
        options,
        steps=80,
        evaluate_every=80,
        checkpoint_every=80,
        ema=0.9,
        learning_rate=1e-2,
        augment=0.0,
        batch_size=16,
    )
    result = train(long, tmp_path)
    assert result.progress.history[-1]["bits_per_dim"] < math.log2(5) - 0.5


def test_a_run_on_the_digits(options, tmp_path):
    """The default data, with their own split and levels."""
    digits = dataclasses.replace(options, data="digits", levels=None, steps=2, augment=0.0, evaluate_every=2)
    result = train(digits, tmp_path)
    assert (result.model.levels, result.model.event_shape) == (17, (1, 8, 8))
    assert [len(s) for s in load_splits(digits)] == [1300, 200]


@pytest.mark.parametrize("parameterization", ["noise", "score", "denoise", "velocity", "edm"])
def test_other_parameterizations(options, tmp_path, parameterization):
    """ScoreNet's five, on another SDE, weighting and law of t, are trained, saved and loaded alike."""
    other = dataclasses.replace(
        options,
        parameterization=parameterization,
        sde="VPSDE",
        sde_options={"t_min": 1e-3},
        weighting="sigma2",
        time_sampling="uniform",
        steps=3,
    )
    result = train(other, tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded, ScoreNet)
    assert loaded.parameterization == parameterization
    assert loaded.sde.t_min == 1e-3
    assert torch.equal(parameters(loaded), parameters(result.model))
    assert math.isfinite(result.progress.history[-1]["bits_per_dim"])


def test_colour_images_from_a_folder(options, tmp_path):
    """A folder of RGB files: three channels, 256 levels."""
    (tmp_path / "data").mkdir()
    for i in range(12):
        array = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "data" / f"{i}.png")
    colour = dataclasses.replace(
        options, data=str(tmp_path / "data"), levels=None, parameterization="edm", steps=2, evaluate_every=2
    )
    model = train(colour, tmp_path / "run").model
    assert (model.levels, model.event_shape) == (256, (3, 4, 4))


def test_nothing_global_changes(options, tmp_path, capsys):
    """Random states, thread count and the handler of Ctrl-C are as before; without progress nothing is printed."""
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    train(dataclasses.replace(options, dropout=0.2, steps=3, threads=threads + 1), tmp_path)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    assert (threads, handler) == (torch.get_num_threads(), signal.getsignal(signal.SIGINT))
    assert capsys.readouterr().out == ""


def test_the_seed_decides_everything(options, tmp_path):
    """The same seed gives the same parameters whatever the global state; another one gives others from the start."""
    short = dataclasses.replace(options, steps=3, dropout=0.2)
    torch.manual_seed(1)
    a = train(short, tmp_path / "a").model
    torch.manual_seed(2)
    b = train(short, tmp_path / "b").model
    c = train(dataclasses.replace(short, seed=1), tmp_path / "c").model
    assert torch.equal(parameters(a), parameters(b))
    assert not torch.equal(parameters(a), parameters(c))
    images = load_splits(options)[0]
    first = [parameters(build_model(dataclasses.replace(options, seed=s), images)) for s in (0, 0, 1)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_a_run_outside_the_main_thread(options, tmp_path):
    """Signal handlers cannot be set there; training works all the same."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train(dataclasses.replace(options, steps=2), tmp_path)))
    thread.start()
    thread.join()
    assert results[0].progress.step == 2


# -- splits and schedules --------------------------------------------------------------------------------------------


def test_the_split_of_other_data(options):
    """validation_fraction of the images, at random by the seed, no image in both and none lost."""
    with np.load(options.data) as archive:
        whole = archive["images"]
    train_part, validation = load_splits(options)
    assert (len(train_part), len(validation)) == (54, 6)
    together = torch.cat([train_part.values, validation.values])
    assert sorted(v.numpy().astype(np.uint8).tobytes() for v in together) == sorted(v.tobytes() for v in whole)
    again, other = load_splits(options)[1], load_splits(dataclasses.replace(options, seed=1))[1]
    assert torch.equal(validation.values, again.values)
    assert not torch.equal(validation.values, other.values)
    assert len(load_splits(dataclasses.replace(options, validation_fraction=0.5))[1]) == 30
    with pytest.raises(ValueError, match="too few to hold 60 out"):
        load_splits(dataclasses.replace(options, validation_fraction=0.999))


def test_the_average_warms_up():
    """The decay of step n is (1 + n) / (10 + n), and what was asked for once that is larger."""
    average, model = (nn.Linear(1, 1, bias=False) for _ in range(2))
    with torch.no_grad():
        for step, decay in ((0, 1 / 10), (8, 9 / 18), (98, 99 / 108), (100_000, 0.99)):
            average.weight.fill_(1.0)
            model.weight.fill_(3.0)
            loop._update_average(average, model, step, 0.99)
            assert float(average.weight) == pytest.approx(decay * 1.0 + (1 - decay) * 3.0, rel=1e-5)


def test_learning_rate():
    """A linear warm-up to the peak, then half a cosine to the final share of it."""
    o = TrainOptions(steps=1000, warmup=10, learning_rate=2e-3, final_learning_rate=0.1)
    rate = loop._learning_rate
    assert rate(0, 0.0, o) == pytest.approx(2e-4)
    assert rate(4, 0.0, o) == pytest.approx(1e-3)
    assert rate(9, 0.0, o) == pytest.approx(2e-3)
    assert rate(500, 0.5, o) == pytest.approx(2e-3 * 0.55)
    assert rate(999, 1.0, o) == pytest.approx(2e-4)
    assert rate(999, 1.7, o) == pytest.approx(2e-4)
    assert rate(0, 0.0, dataclasses.replace(o, warmup=0)) == pytest.approx(2e-3)


class Clock:
    """Each look at it is ten seconds later."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 10.0
        return self.now


def test_minutes_end_a_run(options, tmp_path, monkeypatch):
    """With ten seconds a step, one minute is six steps; the run ends as a finished one, evaluated and saved."""
    monkeypatch.setattr(
        loop, "time", types.SimpleNamespace(perf_counter=Clock().perf_counter, process_time=lambda: 0.0)
    )
    rates = []
    real = loop._learning_rate
    monkeypatch.setattr(loop, "_learning_rate", lambda *a: rates.append(real(*a)) or rates[-1])
    timed = dataclasses.replace(options, steps=1000, minutes=1.0, evaluate_every=500, warmup=0)
    result = train(timed, tmp_path)
    assert result.progress.step == 6
    assert result.progress.seconds == 60.0
    assert result.progress.history[-1]["step"] == 6
    assert "bits_per_dim" in result.progress.history[-1]
    assert folders(tmp_path)[0].name == "step-00000006"
    assert load(tmp_path).levels == 5
    expected = [2e-3 * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / 6))) for i in range(6)]
    assert rates[::2] == rates[1::2] == pytest.approx(expected)  # two groups; the schedule follows the clock


# -- stopping and going on -------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(options, tmp_path):
    """Ctrl-C at step 6 of 12 saves and says how to resume; the end is bit for bit that of an uninterrupted run."""
    with_dropout = dataclasses.replace(options, dropout=0.2)
    train(with_dropout, tmp_path / "whole")
    with pytest.raises(TrainingStopped, match=r"interrupted at step 6 of 12; saved in .*resume true --out"):
        train(with_dropout, tmp_path / "parts", on_evaluate=interrupt_at(6))
    assert not (tmp_path / "parts" / "model").exists()
    assert folders(tmp_path / "parts")[0].name == "step-00000006"
    assert load(tmp_path / "parts").levels == 5  # the newest checkpoint is a model already
    torch.manual_seed(99)  # what happened in between does not matter
    result = train(with_dropout, tmp_path / "parts", resume=True)
    assert result.progress.step == 12
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_interrupt_stops_at_once(options, tmp_path):
    """The handler steps aside after the first Ctrl-C, so that a hanging step can be left."""

    def press_twice(model, record):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(options, tmp_path, on_evaluate=press_twice)
    assert signal.getsignal(signal.SIGINT) == before
    assert folders(tmp_path)[0].name == "step-00000004"


def test_resuming_a_finished_run_changes_nothing(options, tmp_path):
    """It ends at once with the same model."""
    first = train(options, tmp_path)
    again = train(options, tmp_path, resume=True)
    assert again.progress.step == 12
    assert torch.equal(parameters(first.model), parameters(again.model))


@pytest.mark.parametrize("name", ["training.safetensors", "model.safetensors", "training.json"])
def test_a_damaged_checkpoint_is_skipped(options, tmp_path, name):
    """A warning names the newest, damaged one; the run goes on from the one before and ends the same."""
    with pytest.raises(TrainingStopped):
        train(options, tmp_path / "parts", on_evaluate=interrupt_at(6))
    truncate(folders(tmp_path / "parts")[0] / name)
    with pytest.warns(UserWarning, match=r"skipped .*step-00000006.*"):
        train(options, tmp_path / "parts", resume=True)
    train(options, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(options, tmp_path):
    """It must not stay in the place of the good one that is due at its step."""
    with pytest.raises(TrainingStopped):
        train(options, tmp_path, on_evaluate=interrupt_at(6))
    truncate(folders(tmp_path)[0] / "training.safetensors")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(TrainingStopped, match="step 6"):
        train(options, tmp_path, resume=True, on_evaluate=interrupt_at(6))
    saved, problems = read_latest(tmp_path)
    assert saved.progress.step == 6
    assert problems == []


def test_a_crash_in_the_middle_of_a_checkpoint(options, tmp_path, monkeypatch):
    """The half-written draft is not taken for a checkpoint, and is cleared by the next save of that step."""
    from scoresde.train import checkpoint

    real = checkpoint.write_tensors
    steps = []

    def crash(path, tensors, header=None):
        steps.append(path)
        if len(steps) == 2:
            raise OSError(28, "No space left on device")
        real(path, tensors, header)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write_tensors", crash)
        with pytest.raises(OSError, match="No space left"):
            train(options, tmp_path)
    assert [f.name for f in folders(tmp_path)] == ["step-00000004"]
    assert read_latest(tmp_path)[0].progress.step == 4
    train(options, tmp_path, resume=True)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000008", "step-00000012"]


def test_resume_with_other_options_lists_them(options, tmp_path):
    """Each differing option with both values; nothing is overwritten."""
    train(dataclasses.replace(options, steps=4), tmp_path)
    other = dataclasses.replace(options, steps=4, learning_rate=1e-4, channels=(8, 24))
    with pytest.raises(ValueError, match="cannot resume") as error:
        train(other, tmp_path, resume=True)
    text = str(error.value)
    assert "learning_rate: 0.002 in the checkpoint, 0.0001 now" in text
    assert "channels: [8, 16] in the checkpoint, [8, 24] now" in text
    assert "steps" not in text.split("Resume with")[0].replace("steps=", "")
    assert [f.name for f in folders(tmp_path)] == ["step-00000004"]


def test_a_folder_with_a_run_is_not_overwritten(options, tmp_path):
    """Neither one with checkpoints nor one with a model alone."""
    train(dataclasses.replace(options, steps=4), tmp_path)
    with pytest.raises(ValueError, match=r"already holds a training run; resume it .* or choose another"):
        train(options, tmp_path)
    for folder in folders(tmp_path):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    with pytest.raises(ValueError, match="already holds"):
        train(options, tmp_path)


def test_nothing_to_resume(options, tmp_path):
    """An empty or missing folder, and one whose only checkpoint is damaged, say so; nothing is created."""
    with pytest.raises(ValueError, match="no readable checkpoint"):
        train(options, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    train(dataclasses.replace(options, steps=4), tmp_path)
    truncate(folders(tmp_path)[0] / "training.safetensors")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match=r"no readable checkpoint.*step-00000004"),
    ):
        train(options, tmp_path, resume=True)


def test_an_unwritable_folder_is_found_before_training(options, tmp_path):
    """The message names the folder."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(PermissionError, match=r"cannot write to .*file/run"):
        train(options, tmp_path / "file" / "run", on_evaluate=lambda *_: pytest.fail("it trained"))


# -- NaN -------------------------------------------------------------------------------------------------------------


def test_a_single_nan_is_skipped(options, tmp_path, monkeypatch):
    """One bad step leaves the parameters alone and the run goes on to a finite end."""
    real, calls = loop.denoising_loss, []

    def sometimes(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) in (2, 5) else 1.0)

    monkeypatch.setattr(loop, "denoising_loss", sometimes)
    result = train(options, tmp_path)
    assert result.progress.step == 12
    assert bool(torch.isfinite(parameters(result.model)).all())
    assert all(math.isfinite(v) for r in result.progress.history for v in r.values())


def test_nan_ten_times_in_a_row_stops(options, tmp_path, monkeypatch):
    """The message says since when, how to go on, and names a checkpoint that exists and is from before."""
    real, calls = loop.denoising_loss, []

    def later(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) > 9 else 1.0)

    monkeypatch.setattr(loop, "denoising_loss", later)
    with pytest.raises(TrainingStopped, match=r"10 steps in a row, up to step 19; .*learning_rate") as error:
        train(dataclasses.replace(options, steps=40), tmp_path)
    named = [f for f in folders(tmp_path) if str(f) in str(error.value)]
    assert [f.name for f in named] == ["step-00000008"]
    saved, problems = read_latest(tmp_path)
    assert problems == []
    assert all(bool(torch.isfinite(v).all()) for v in (saved.tensors | saved.average).values())
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("evaluate_every", [100, 6], ids=["no evaluation", "evaluation"])
def test_divergence_stops(options, tmp_path, evaluate_every):
    """A learning rate of 1e30 ends as a stop of training, not as an error of the likelihood or a run of NaNs."""
    wild = dataclasses.replace(options, steps=60, learning_rate=1e30, warmup=0, evaluate_every=evaluate_every)
    with pytest.raises(TrainingStopped, match="Lower learning_rate"):
        train(wild, tmp_path)
    assert not (tmp_path / "model").exists()


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAIN_PRESETS)
def test_options_survive_json(name):
    """Through text and back they are the same, tuples and None included."""
    o = dataclasses.replace(TRAIN_PRESETS[name], log_snr_range=None if name == "digits" else (-3.0, 4.0))
    assert TrainOptions.from_json(json.loads(json.dumps(o.to_json()))) == o


def test_unknown_options_are_named():
    """A typo in a saved file is not dropped."""
    with pytest.raises(ValueError, match=r"unknown training options learning_rte; known are .*learning_rate"):
        TrainOptions.from_json({"learning_rte": 1.0})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(sde="VP"), "unknown SDE 'VP'; choose one of: VPSDE"),
        (dict(parameterization="eps"), "parameterization"),
        (dict(weighting="none"), "weighting"),
        (dict(time_sampling="gauss"), "time sampling"),
        (dict(steps=0), "steps"),
        (dict(batch_size=0), "batch_size"),
        (dict(evaluate_every=-1), "evaluate_every"),
        (dict(learning_rate=0.0), "learning_rate"),
        (dict(learning_rate=math.nan), "learning_rate"),
        (dict(minutes=-1.0), "minutes"),
        (dict(augment=1.0), "augment"),
        (dict(ema=1.0), "ema"),
        (dict(dropout=-0.1), "dropout"),
        (dict(warmup=-5), "warmup"),
        (dict(final_learning_rate=-1.0), "final_learning_rate"),
        (dict(weight_decay=-1.0), "weight_decay"),
        (dict(weight_decay=math.inf), "weight_decay"),
        (dict(steps="5"), "steps"),
        (dict(learning_rate="1e-3"), "learning_rate"),
        (dict(warmup="10"), "warmup"),
        (dict(ema="0.9"), "ema"),
        (dict(dropout=None), "dropout"),
        (dict(seed=1.5), "seed"),
        (dict(seed=True), "seed"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**64), "seed"),
        (dict(threads=10**6), "threads must be from 1 to 1024"),
        (dict(batch_size=2.0), "batch_size"),
        (dict(levels=1), "levels"),
        (dict(levels="17"), "levels"),
        (dict(channels=(8, 16)[:1]), "one entry per resolution"),
        (dict(channels="8,16"), "channels"),
        (dict(channels=(8, 0)), "channels"),
        (dict(blocks=(1, -1)), "blocks"),
        (dict(log_snr_range=(3.0, -3.0)), "log_snr_range"),
        (dict(log_snr_range=(3.0,)), "log_snr_range"),
        (dict(log_snr_range=("a", 3.0)), "log_snr_range"),
        (dict(data=3), "data"),
        (dict(sde="VPSDE"), "sde_options .* do not fit VPSDE"),
        (dict(sde_options=[1]), "sde_options"),
    ],
    ids=str,
)
def test_bad_options(bad, message):
    """Each is refused when the options are made, before any data are read."""
    with pytest.raises((ValueError, TypeError), match=message) as error:
        TrainOptions(**bad)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy():
    """They are taken, and saved as plain ones."""
    options = TrainOptions(
        steps=np.int64(7), seed=np.uint64(2**63), learning_rate=np.float32(0.5), channels=[np.int32(8), 16]
    )
    assert json.loads(json.dumps(options.to_json()))["seed"] == 2**63
    assert (options.steps, options.learning_rate, options.channels) == (7, 0.5, (8, 16))


def test_options_that_are_none(tmp_path):
    """Another kind of object in their place."""
    with pytest.raises(TypeError, match="options must be TrainOptions, got dict"):
        train({"steps": 3}, tmp_path)


# -- the average -----------------------------------------------------------------------------------------------------


def test_the_warm_up_of_the_average():
    """After step n = 0, 1, ... the average keeps min(decay, (1 + n) / (10 + n)) of itself: by hand, with decay 0.25."""
    model, average = torch.nn.Linear(1, 1, bias=False).double(), torch.nn.Linear(1, 1, bias=False).double()
    values = [3.0, -1.0, 2.0, 5.0, 4.0]
    torch.nn.init.constant_(average.weight, 10.0)
    found = []
    for n, value in enumerate(values):
        torch.nn.init.constant_(model.weight, value)
        loop._update_average(average, model, n, 0.25)
        found.append(average.weight.item())
    # decays 1/10, 2/11, 3/12 = 1/4, then 4/13 and 5/14, which are above 1/4
    a = 0.1 * 10.0 + 0.9 * 3.0
    b = 2 / 11 * a + 9 / 11 * -1.0
    c = 0.25 * b + 0.75 * 2.0
    d = 0.25 * c + 0.75 * 5.0
    e = 0.25 * d + 0.75 * 4.0
    assert found == pytest.approx([a, b, c, d, e], rel=1e-14)
    assert found[:2] == pytest.approx([3.7, -0.14545454545454545], rel=1e-12)


def test_the_average_of_a_run(options, tmp_path):
    """What a run saves is that recursion over its parameters, one step after the other, from the initial ones on."""
    seen = []
    real = loop._update_average

    def watched(average, model, step, decay):
        if not seen:
            seen.append(parameters(average).double())
        real(average, model, step, decay)
        kept = min(0.9, (1.0 + step) / (10.0 + step))
        seen.append(kept * seen[-1] + (1 - kept) * parameters(model).double())

    loop._update_average = watched
    try:
        result = train(dataclasses.replace(options, ema=0.9), tmp_path)
    finally:
        loop._update_average = real
    assert len(seen) == 13
    torch.testing.assert_close(parameters(result.model).double(), seen[-1], rtol=1e-5, atol=1e-6)
    first = torch.cat([p.detach().flatten() for p in build_model(options, load_splits(options)[0]).parameters()])
    torch.testing.assert_close(seen[0], first.double())


# -- options for the data at hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "levels", "expected"),
    [
        ((1, 28, 28), 256, ("edm", (32, 64, 128), (1, 1, 2))),
        ((3, 32, 32), 256, ("edm", (32, 64, 128), (1, 1, 2))),
        ((1, 27, 27), 256, ("edm", (32, 64, 128), (1, 1, 2))),
        ((1, 4, 4), 256, ("edm", (32,), (2,))),
        ((1, 14, 30), 256, ("edm", (32, 64), (1, 2))),
        ((1, 8, 8), 17, ("levels", (32, 64), (2, 4))),
        ((1, 28, 28), 2, ("levels", (32, 64, 128), (1, 1, 2))),
        ((1, 8, 8, 8), 256, ("edm", (32, 64), (1, 2))),
    ],
    ids=str,
)
def test_options_for_the_data_at_hand(shape, levels, expected):
    """Logits for few levels, edm for many; as many resolutions as the sides allow; a model of them can be built."""
    images = Images(torch.arange(4 * math.prod(shape)).reshape(4, *shape) % levels, levels, "some")
    chosen, why = options_for(images)
    assert (chosen.parameterization, chosen.channels, chosen.blocks) == expected
    assert f"{levels} levels" in why
    assert f"parameterization {expected[0]}" in why
    assert chosen.augment == (0.0 if len(shape) > 3 else 0.2 if levels > 64 else 0.35)
    if levels > 64:
        x = images.values.double() / (levels - 1) * 2 - 1
        assert chosen.sigma_data == pytest.approx(float(x.square().mean().sqrt()), abs=0.006)
    model = build_model(chosen, images).eval()
    assert model.event_shape == shape
    x = torch.zeros(2, *shape)
    assert model.denoise(x, torch.full((2,), 0.5), torch.zeros(2, 8) if chosen.augment else None).shape == x.shape
    given, _ = options_for(images, parameterization="noise", channels=(8,), blocks=(1,), steps=3, augment=0.0)
    assert (given.parameterization, given.channels, given.steps, given.augment) == ("noise", (8,), 3, 0.0)


def test_the_mean_of_the_data(options):
    """Of the dequantized training images, pixel by pixel, on the model's scale."""
    images = Images(torch.tensor([0, 1, 4, 4]).reshape(2, 1, 1, 2), 5, "some")
    expected = torch.tensor([[[-1 + 2.5 * 0.4, -1 + 3.0 * 0.4]]])  # mean levels 2 and 2.5, half a level up
    torch.testing.assert_close(mean_of(images), expected)
    if hasattr(ScoreNet, "data_mean"):
        for parameterization in ("levels", "edm"):
            chosen = dataclasses.replace(options, parameterization=parameterization, channels=(8,), blocks=(1,))
            torch.testing.assert_close(build_model(chosen, images).data_mean, expected)


def test_attention_over_many_positions_is_left_out():
    """Its bias for every pair of positions would take hundreds of megabytes."""
    images = Images(torch.zeros(2, 1, 201, 201, dtype=torch.int64), 256, "some")
    chosen, _ = options_for(images)
    assert sum(p.numel() for p in build_model(chosen, images).parameters()) < 2_000_000


def test_a_long_validation_is_cut(monkeypatch):
    """Of many images the first 512 are looked at, with fewer draws each; of few, all with sixteen."""
    asked = []

    def bound(model, x, *, draws, seed):
        asked.append((len(x), draws, seed))
        return types.SimpleNamespace(value=torch.zeros(len(x)))

    monkeypatch.setattr(loop, "elbo", bound)
    model = torch.nn.Linear(1, 1)
    model.value_range = (-1.0, 1.0)
    for n in (200, 2000):
        loop._evaluate(model, Images(torch.zeros(n, 1, 2, 2, dtype=torch.int64), 5, "some"), loop.Progress())
    assert [a[:2] for a in asked] == [(200, 16), (256, 6), (256, 6)]
    assert asked[0][2] == asked[1][2] == 1 != asked[2][2]


@pytest.mark.parametrize("name", ["tpu", "cuda:99"])
def test_bad_devices(options, tmp_path, name):
    """An unknown device is named and nothing is written."""
    with pytest.raises(ValueError, match="device"):
        train(options, tmp_path / "run", device=name)
    assert not (tmp_path / "run" / "model").exists()
