"""Faults of the field (FAULTS.md) that no other file covers, or that only show across rooms.

Elsewhere: 1 NaN from the network (test_samplers, test_ode, test_likelihood); 3, 4, 11 times and schedules (test_sde);
5, 6, 12, 13 empty batches, shapes, few steps, zero score (test_samplers, test_likelihood, test_model); 8, 9 levels and
ranges (test_likelihood); 10 half precision (test_model, test_likelihood); 14 seeds and chunks (test_rng, test_samplers);
15, 16, 19, 20 checkpoints (test_train); 21, 22 networks that write in place or return no numbers (test_impure_networks);
24 seeds (test_rng); 25, 37 data that are not what they say (test_data); 26 options (test_model_options); 27 full disks and
Ctrl-C (test_program); 28 runs and their folders (test_runs); 30 half precision in losses (test_losses).
"""

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import scoresde
from scoresde import METHODS, VESDE, VPSDE, NonFiniteError, ScoreNet, log_prob, sample
from scoresde.ode import MAX_NFE
from scoresde.rng import spawn
from scoresde.samplers import ProbabilityFlow

UNDER_O = """
import torch
from torch import nn
from scoresde import METHODS, VPSDE, NonFiniteError, ScoreNet, log_prob, sample

assert False, "python -O removes this line"

class NaN(nn.Module):
    def forward(self, x, label):
        return torch.where((label < 0.5)[:, None], float("nan"), 0.9 * x)

model = ScoreNet(NaN(), VPSDE())
for method in METHODS:
    try:
        sample(model, (2, 2), method=method, steps=5, seed=0)
    except NonFiniteError as e:
        print(method, "t = " in str(e) and "rows [0, 1]" in str(e))
try:
    log_prob(model, torch.zeros(2, 2))
except NonFiniteError as e:
    print("log_prob", "t = " in str(e) and "rows [0, 1]" in str(e))
"""


def test_nan_under_python_o():
    """Fault 1: the errors do not live in assert statements, so python -O changes nothing and nothing hangs."""
    environment = {**os.environ, "PYTHONPATH": str(Path(scoresde.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-O", "-c", UNDER_O], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{name} True" for name in (*METHODS, "log_prob")]


class Stiff(nn.Module):
    """A noise prediction that pulls with a huge constant."""

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def forward(self, x, label):
        return self.strength * x


def test_stiff_drift():
    """Fault 2: a stiff flow meets its budget with t, evaluations and advice in the error, or a status per example."""
    model = ScoreNet(Stiff(1e6), VPSDE(), "noise")
    with pytest.raises(
        RuntimeError, match=r"rows \[0, 1\].*stopped at the step from t = .*\d+ evaluations.*(max_nfe|rtol)"
    ):
        sample(model, (2, 2), method=ProbabilityFlow(max_nfe=300), seed=0)
    got = log_prob(ScoreNet(Stiff(-1e6), VPSDE(), "noise"), torch.ones(2, 2), max_nfe=300)
    assert (got.status == MAX_NFE).all()
    assert torch.isnan(got.value).all()
    assert torch.isfinite(got.latent).all()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ode", "torchdiffeq", "rk45")])
def test_exploding_drift(method):
    """Fault 2: a network that overflows float32 on the way is an error with the step, not a batch of infinities."""
    model = ScoreNet(Stiff(-1e30), VPSDE(), "noise")
    with pytest.raises(NonFiniteError, match=r"step [0-9]+.*t = .*more steps"):
        sample(model, (2, 2), method=method, steps=10, seed=0)


@pytest.mark.parametrize("method", METHODS)
def test_sampling_to_time_zero(method, ring8):
    """Fault 3: t_min = 0, where sigma is exactly 0 and the score undefined, gives finite samples of the exact model."""
    for sde in (VPSDE(t_min=0.0), VESDE(t_min=0.0)):
        x = sample(ring8.diffuse(sde), (16, 2), method=method, steps=None if method == "ode" else 20, seed=0)
        assert torch.isfinite(x).all()


def test_grids_outside_the_range(ring8):
    """Fault 4: a grid that leaves [0, 1], or runs the wrong way, is refused at entry."""
    model = ring8.diffuse(VPSDE())
    for grid in ([1.5, 0.1], [1.0, -0.1], [0.1, 0.9], [0.5, 0.5], [math.nan, 0.1]):
        with pytest.raises(ValueError, match="decrease strictly"):
            sample(model, (2, 2), method="ddim", grid=grid)


def test_channels_last_is_not_broadcast(image16):
    """Fault 6: an image in the wrong layout is refused with both shapes by samplers and likelihood alike."""
    model = image16.diffuse(VPSDE())
    for call in (lambda: sample(model, (2, 4, 4, 1)), lambda: log_prob(model, torch.zeros(2, 4, 4, 1))):
        with pytest.raises(ValueError, match=r"\(1, 4, 4\), got \(4, 4, 1\)"):
            call()


def test_chunks_and_threads(ring8):
    """Fault 14: the number of threads and the size of chunks do not change samples drawn with a seed each."""
    model, seeds = ring8.diffuse(VPSDE()), spawn(0, 12)
    whole = sample(model, (12, 2), method="pc", steps=30, seed=seeds)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        parts = [sample(model, (4, 2), method="pc", steps=30, seed=seeds[i : i + 4]) for i in (0, 4, 8)]
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


def test_two_threads_sample_one_network_in_training_mode():
    """Fault 33: dropout is off for both, whoever comes or goes first, and the mode is put back by the last."""

    class Waits(nn.Module):
        """Notes whether it is in training mode at every call; the first call of a thread waits for its turn."""

        def __init__(self):
            super().__init__()
            self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()
            self.turns, self.seen = {}, []

        def forward(self, x, label):
            turn = self.turns.pop(threading.get_ident(), None)
            if turn:
                turn[0].set()
                assert turn[1].wait(60)
            self.seen.append(self.training or self.dropout.training)
            return self.dropout(0.5 * x)

    net = Waits()
    models = ScoreNet(net, VPSDE()), ScoreNet(net, VPSDE())
    expected = sample(ScoreNet(net.eval(), VPSDE()), (4, 2), method="ddim", steps=3, seed=0)
    for model in models:
        model.train()
    net.frozen.eval()
    came, leave, results = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()], {}

    def work(i):
        net.turns[threading.get_ident()] = came[i], leave[i]
        results[i] = sample(models[i], (4, 2), method="ddim", steps=3, seed=0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for i in range(2):  # the first is inside when the second comes, and leaves before it
        threads[i].start()
        assert came[i].wait(60)
    for i in range(2):
        leave[i].set()
        threads[i].join(60)
        assert net.training == (i == 1)
    assert not any(net.seen)
    assert torch.equal(results[0], expected)
    assert torch.equal(results[1], expected)
    assert net.dropout.training
    assert not net.frozen.training
