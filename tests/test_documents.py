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


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_hold_their_outputs(path):
    """A stored notebook was run from top to bottom, without an error, and has pictures."""
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert not any(o["output_type"] == "error" for o in outputs)
    assert any("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, monkeypatch):
    """Every cell in a fresh kernel; after the cell tagged "parameters" the notebook's own "fast" values shorten training."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, 4)
    fast = notebook.metadata.get("fast", {})
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == (1 if fast else 0)
    for cell in tagged:
        assert all(f"{name} = " in cell.source for name in fast)
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in fast.items())
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
