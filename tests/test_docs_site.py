"""The site builds without a warning, loads nothing from elsewhere, names everything public, and its formulas and figures show."""

import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import scoresde

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROOMS = (
    "scoresde",
    *(
        f"scoresde.{r}"
        for r in ("samplers", "nets", "likelihood", "interop", "plots", "data", "train", "distill", "guidance")
    ),
)
MISSING = [
    m for m in ("sphinx", "myst_nb", "furo", "autodoc2", "sphinx_copybutton") if importlib.util.find_spec(m) is None
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOADS = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "embed": "src",
    "object": "data",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"the docs extra is not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built pages, made once, by whichever process of the test run comes first."""
    base = tmp_path_factory.getbasetemp()
    if base.name.startswith("popen-"):  # a worker of pytest-xdist: the folder above is common to all
        base = base.parent
    out, done = base / "site", base / "site.json"
    try:
        (base / "site.lock").mkdir()
    except FileExistsError:
        for _ in range(2400):
            if done.exists():
                break
            time.sleep(0.25)
    else:
        command = [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning", "--keep-going", "--quiet"]
        command += ["--doctree-dir", str(base / "site-doctrees"), str(DOCS), str(out)]
        ran = subprocess.run(command, capture_output=True, text=True)
        (base / "site.part").write_text(json.dumps([ran.returncode, ran.stdout[-4000:] + ran.stderr[-4000:]]))
        (base / "site.part").rename(done)
    code, said = json.loads(done.read_text())
    assert code == 0, said
    return out


class Loads(HTMLParser):
    """The addresses that a browser fetches to show a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get(LOADS.get(tag, "")) and not (
            tag == "link" and attrs.get("rel") in ("index", "search", "next", "prev")
        ):
            self.found.append(attrs[LOADS[tag]])


def test_nothing_is_loaded_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        reader = Loads()
        reader.feed(text)
        assert any("mathjax" in address for address in reader.found) or 'class="math' not in text
        for address in reader.found:
            assert not re.match(r"(?:https?:)?//", address), f"{page.name} loads {address}"
            if not address.startswith("data:"):
                file = page.parent / address.split("?")[0].split("#")[0]
                assert file.exists(), f"{page.name} loads {address}, which is not there"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text()
        assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//", text), sheet


def test_every_public_name_is_described(site):
    """Classes, functions and constants, by the inventory that other sites link to."""
    from sphinx.util.inventory import InventoryFile

    with open(site / "objects.inv", "rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    described = {
        name for kind in ("class", "exception", "function", "data") for name in inventory.get(f"py:{kind}", {})
    }
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert f"{value.__module__}.{value.__qualname__}" in described, f"{room}.{name} has no entry"
            elif room == "scoresde":  # the constants of the other rooms, such as colours, need none
                assert name in described, f"{room}.{name} has no entry"


def test_the_overview_lists_every_public_name(site):
    text = (site / "api" / "index.html").read_text()
    for name in scoresde.__all__:
        assert f">{name}<" in text, name


PROBE = """
<script>
window.addEventListener("load", async () => {
  if (window.MathJax) await MathJax.startup.promise;
  const images = [...document.images].map((i) => ({src: i.getAttribute("src"), width: i.naturalWidth}));
  const fetched = performance.getEntriesByType("resource").map((e) => e.name);
  const errors = document.querySelectorAll("[data-mml-node=merror], mjx-container [fill=red]").length;
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const formulas = document.querySelectorAll("mjx-container > svg").length;
  const written = document.querySelectorAll("span.math, div.math").length;
  document.documentElement.dataset.seen = JSON.stringify({images, fetched, errors, wide, formulas, written});
});
</script></body>
"""


def seen(site, page, size="1280,1600"):
    """What a browser makes of a page: its images, formulas, and everything that it fetched."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here to look at the pages with")
    source = site / f"{page}.html"
    copy = source.with_name(f"probe-{source.stem}.html")
    copy.write_text(source.read_text().replace("</body>", PROBE))
    try:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}"]
        command += ["--virtual-time-budget=20000", "--dump-dom", copy.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    finally:
        copy.unlink()
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, f"{page} did not finish loading:\n{dom[-2000:]}"
    answer = json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))
    assert all(address.startswith(("file:", "data:")) for address in answer["fetched"])
    assert not answer["wide"], f"{page} is wider than its window"
    assert answer["formulas"] == answer["written"], f"{page} has formulas that are not drawn"
    assert answer["errors"] == 0, f"{page} has formulas with errors"
    return answer


def test_the_front_page_in_a_browser(site):
    seen(site, "index", "400,1600")  # on a phone


def test_a_notebook_in_a_browser(site):
    answer = seen(site, "notebooks/quickstart")
    assert answer["formulas"] >= 5
    figures = [image for image in answer["images"] if "_images" in image["src"]]
    assert len(figures) >= 2
    assert all(image["width"] > 100 for image in figures)


def test_the_theory_page_in_a_browser(site):
    """As many formulas drawn as its source has."""
    answer = seen(site, "theory")
    text = (DOCS / "theory.md").read_text()
    written = len(re.findall(r"\$\$.*?\$\$|\$[^$]+\$", text, re.S))
    assert answer["formulas"] == written


def test_the_figures_of_the_results_in_a_browser(site):
    answer = seen(site, "results")
    assert len(answer["images"]) >= 2
    assert all(image["width"] > 100 for image in answer["images"])
