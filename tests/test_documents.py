"""What the README and the notebooks show runs as it stands, and the help is there."""

import json
import re
from pathlib import Path

import pytest
import torch

from scoresde import METHODS

ROOT = Path(__file__).parents[1]
PYTHON = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.slow
def test_the_readme_s_two_dimensional_examples_run_in_order():
    """The first two code blocks, one after the other; the density agrees with the closed form as the text says."""
    names = {}
    exec(PYTHON[0], names)
    error = (names["result"].value - names["mixture"].log_prob(names["x"])).abs().mean()
    assert error < 1e-3
    exec(PYTHON[1].replace("range(2000)", "range(200)"), names)
    assert names["x"].shape == (1000, 2)


@pytest.mark.slow
def test_the_readme_s_few_step_example_runs_on_the_first_model():
    """`auto` and `tune`, with the mixture of the first block, gain what the report says."""
    names = {}
    exec(PYTHON[0], names)
    exec(next(block for block in PYTHON if "tune(" in block), names)
    assert names["eight"].report.gained
    assert names["x"].shape == (1000, 2)


def test_the_readme_s_likelihoods_run_on_the_first_model():
    """The block of the likelihood's options, on fewer of the first block's samples."""
    names = {}
    exec(PYTHON[0], names)
    names["x"] = names["x"][:50]
    exec(next(block for block in PYTHON if "plan_likelihood" in block), names)


def test_the_readme_s_networks_run():
    """The block of networks: the count that it states, and a guided model that denoises a volume."""
    names = {}
    exec(next(block for block in PYTHON if "preset(" in block), names)
    assert sum(p.numel() for p in names["net"].parameters()) == 62_758_787
    x = torch.zeros(2, 1, 16, 16, 16)
    with torch.no_grad():
        assert names["model"].denoise(x, 0.5, torch.tensor([1, 2])).shape == x.shape


def test_the_readme_lists_every_method():
    table = (ROOT / "README.md").read_text()
    for name in METHODS:
        assert f"| `{name}` |" in table


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run_and_hold_their_outputs(path, monkeypatch):
    """Every code cell in order, in one namespace; a stored notebook has outputs and no stored error."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert any(c["outputs"] for c in cells)
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
