"""What README, the site and the notebooks show is true: code runs, tables come from measurements, links lead somewhere."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

from scoresde import METHODS, VPSDE, sample

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "api").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)

# what a page's code says -> what the tests run in its place (shorter trainings, fewer images)
FAST = {"range(2000)": "range(20)", "(1000, 2)": "(100, 2)", 'digits("test").values': 'digits("test").values[:2]'}
# pages with blocks marked `py`, which need published checkpoints or a hub: how many. They are only compiled.
NOT_RUN = {"README.md": 1, "docs/bring-your-own.md": 1}
OPTIONAL = {"diffusers"}  # where one of these is not installed, a page's code runs up to the block that imports it


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, kind):
    return [code for info, code in BLOCK.findall(page.read_text()) if info == kind]


def load_script(path):
    """A script beside the package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = load_script(DOCS / "results_tables.py")


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory):
    """A folder with runs/digits, as `scoresde train --preset digits` leaves it, of a tiny network after four steps."""
    from scoresde.train import TRAIN_PRESETS, train

    folder = tmp_path_factory.mktemp("pages")
    tiny = dict(channels=(8, 16), blocks=(1, 1), batch_size=8, steps=4, evaluate_every=4, checkpoint_every=4, warmup=2)
    train(dataclasses.replace(TRAIN_PRESETS["digits"], **tiny), folder / "runs/digits")
    return folder


# -- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_the_code_of_a_page_runs(page, trained_digits, monkeypatch):
    """Its python blocks, one after another in one namespace, as pasted; README's densities agree with their closed form."""
    monkeypatch.chdir(trained_digits)
    names = {"__name__": "__main__"}
    for i, code in enumerate(blocks(page, "python"), 1):
        for said, fast in FAST.items():
            code = code.replace(said, fast)
        try:
            exec(compile(code, f"{name_of(page)}, block {i}", "exec"), names)
        except ModuleNotFoundError as e:
            if e.name not in OPTIONAL:
                raise
            break
        if page == README and i == 1:
            assert (names["result"].value - names["mixture"].log_prob(names["x"])).abs().mean() < 1e-3
    assert "model" in names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_that_is_not_run_is_listed(page):
    """Python stands in blocks marked python, or py where it needs what the tests have not; those are counted and parse."""
    assert len(blocks(page, "py")) == NOT_RUN.get(name_of(page), 0)
    for code in blocks(page, "py"):
        compile(code, name_of(page), "exec")
    for info, code in BLOCK.findall(page.read_text()):
        assert info in ("python", "py") or not re.search(r"^(from|import) \w", code, re.M), code
    for said in re.findall(r"range\(\d{3,}\)", "".join(blocks(page, "python"))):
        assert said in FAST, f"{said} would train for long in the tests: shorten it in FAST"


# -- figures ---------------------------------------------------------------------------------------------------------


def prose(text):
    """A page's text without code, addresses, generated tables and comments."""
    text = TABLES.BLOCK.sub("", text)
    text = re.sub(r"```.*?```|`[^`]*`|<!--.*?-->|\]\([^)]*\)", " ", text, flags=re.S)
    return re.sub(r"^ {4}.*$", "", text, flags=re.M)


@pytest.mark.parametrize("page", TABLES.PAGES, ids=name_of)
def test_measured_tables_are_the_json_files(page):
    assert TABLES.filled(page.read_text()) == page.read_text(), "run `python docs/results_tables.py`"


def test_every_table_is_shown_and_no_other():
    asked = [name for page in TABLES.PAGES for _, name, _ in TABLES.BLOCK.findall(page.read_text())]
    assert sorted(asked) == sorted(TABLES.TABLES)
    assert not [p for p in PAGES if p not in TABLES.PAGES and "<!-- measured:" in p.read_text()]


def test_no_figure_is_written_by_hand():
    """The results page's own text has no digit (but in names, such as 8x8); a table's caption takes its figures from the file."""
    left = re.sub(r"\d+x\d+", "", prose((DOCS / "results.md").read_text()))
    assert not re.findall(r"\d", left)
    for node in ast.walk(ast.parse((DOCS / "results_tables.py").read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(r"\d\.\d|\d\s*%|\de-?\d", node.value.replace("95 %", "")), node.value


def test_the_readme_is_short_and_has_no_results():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert re.findall(r"\d+\.\d+", prose(text)) == ["3.10", "2.0"]  # of Python and of the licence


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        (
            "report-bits-per-dim",
            r"^\| (?:one fixed|eight orthogonal|sixteen)[^|]*(\|[^|]*\|[^|]*\|)|^> ([\d.]+ ± [\d.]+)",
        ),
        ("comparison", r"for \d+ forward passes on a digits|takes \d+;|from [\d.]+ to [\d.]+ nats for \d+|best of \d+"),
        ("comparison", r"cost \d+ to \d+ microseconds|here \d+ to \d+: beside|spends [\d.]+ to [\d.]+ of the cost"),
    ],
)
def test_figures_that_a_page_repeats_are_measured(page, rows):
    """Numbers in the sentences of other pages stand on the results page too."""
    measured = set(re.findall(r"\d+(?:\.\d+)?", (DOCS / "results.md").read_text()))
    found = [m[m.lastindex or 0] for m in re.finditer(rows, (DOCS / f"{page}.md").read_text(), re.M)]
    repeated = re.findall(r"\d+(?:\.\d+)?", " ".join(found))
    assert len(repeated) >= 4
    assert not set(repeated) - measured


def test_the_notebook_s_longer_runs_are_the_recorded_ones():
    text = (ROOT / "notebooks" / "07_real_images.ipynb").read_text()
    rows = TABLES.read("digits")["rows"]
    assert len(rows) >= 3
    for row in rows:
        assert f"{row['bits_per_dim']:.3f} +- {row['stderr']:.3f}" in text


# -- methods ---------------------------------------------------------------------------------------------------------


def methods_table():
    """{name: (kind, evaluations a step, order)} as the guide to samplers has them."""
    rows, kind = {}, None
    lines = (DOCS / "choose-a-sampler.md").read_text().partition("## All methods")[2].splitlines()
    for line in (line for line in lines if line.startswith("| ")):
        first, _, evaluations, order, _ = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        if found := re.fullmatch(r"\*\*(\w+)\*\*", first):
            kind = found[1]
        elif first != "`method=`":
            assert first not in rows, f"{first} twice"
            rows[first.strip("`")] = kind, evaluations, order
    return rows


def test_the_guide_lists_every_method():
    """By name; with what a step costs and the order that the sampler itself states."""
    table = methods_table()
    assert sorted(table) == sorted(METHODS)
    for name, (_, evaluations, order) in table.items():
        sampler = METHODS[name]()
        assert evaluations == ("adaptive" if sampler.nfe_per_step is None else str(sampler.nfe_per_step)), name
        assert order == ("" if sampler.convergence_order is None else str(sampler.convergence_order)), name


@pytest.mark.parametrize("name", METHODS)
def test_the_guide_knows_which_methods_are_stochastic(name, ring8):
    if name in ("torchdiffeq", "sde"):
        pytest.importorskip({"sde": "torchsde"}.get(name, name))
    model = ring8.diffuse(VPSDE())
    start = model.sde.prior_sample((2, 2), seed=0)
    steps = {} if METHODS[name]().nfe_per_step is None else {"steps": 5}
    one, two = (sample(model, (2, 2), method=name, x_init=start, seed=seed, **steps) for seed in (1, 2))
    assert methods_table()[name][0] == ("deterministic" if torch.equal(one, two) else "stochastic")


# -- links and names -------------------------------------------------------------------------------------------------


def slugs(path):
    """The anchors of a Markdown page's headings."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", head).lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """To files that are there and headings that they have."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        if place.parent == DOCS / "notebooks":  # copied there when the site is built
            place = ROOT / "notebooks" / place.name
        assert place.exists(), target
        assert not anchor or anchor in slugs(place), target


def test_the_readme_names_what_exists():
    """Commands and options in code spans and blocks."""
    from scoresde.cli.run import COMMANDS

    text = README.read_text() + (DOCS / "getting-started.md").read_text()
    said = re.findall(r"^(?: {4})?scoresde (\w+)(.*)$", text, re.M)
    assert len(said) >= 6
    for command, rest in said:
        options = inspect.signature(COMMANDS[command]).parameters
        assert set(re.findall(r"--(\w+)", rest.partition("#")[0])) <= set(options), rest
    row = next(line for line in text.splitlines() if line.startswith("| command line"))
    assert set(re.findall(r"`(\w+)`", row)) == set(COMMANDS)


def test_the_design_shows_every_room():
    """The picture has all rooms below one another as they may import, and the table says what they hold."""
    order = load_script(ROOT / "tests" / "test_layers.py").ORDER
    drawn = [room for _, rooms, _ in reversed(load_script(DOCS / "draw_layers.py").LAYERS) for room in rooms]
    assert [room for room in drawn if room in order] == order
    table = (DOCS / "design.md").read_text().partition("| layer | room |")[2].partition("## ")[0]
    for room in order:
        assert re.search(rf"`{room}(/\w*)?`", table), room


# -- notebooks -------------------------------------------------------------------------------------------------------

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
