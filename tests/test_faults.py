"""Faults of the field (FAULTS.md) that no other file covers, or that only show across rooms.

Elsewhere: 1 NaN from the network (test_samplers, test_ode, test_likelihood); 3, 4, 11 times and schedules (test_sde);
5, 6, 12, 13 empty batches, shapes, few steps, zero score (test_samplers, test_likelihood, test_model); 8, 9 levels and
ranges (test_likelihood); 10 half precision (test_model, test_likelihood); 14 seeds and chunks (test_rng, test_samplers);
15, 16, 19, 20 checkpoints (test_train); 25, 37 data that are not what they say (test_data); 27 full disks and Ctrl-C
(test_program); 28 runs and their folders (test_runs).
"""

import math
import os
import subprocess
import sys
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
