"""Builds the site: `make docs`. Nothing in the built pages is fetched from another host."""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]  # docstrings.py, beside this file; and the package where it is not installed

from autodoc2.sphinx import autodoc  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx import addnodes  # noqa: E402

from scoresde import __version__  # noqa: E402

project = "scoresde"
author = "the authors of scoresde"
copyright = "the authors of scoresde, Apache 2.0"
version = release = __version__

extensions = ["myst_nb", "autodoc2", "sphinx.ext.mathjax", "sphinx_copybutton"]
exclude_patterns = ["**/.ipynb_checkpoints", "_static/mathjax"]
suppress_warnings = ["toc.empty_glob"]  # a checkout may have one notebook or eight

myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown with the outputs that are stored in them
nb_merge_streams = True
smartquotes = False  # "ode" and --resume are to be copied

autodoc2_packages = [{"path": "../scoresde", "auto_mode": False}]
autodoc2_render_plugin = "docstrings.Renderer"
autodoc2_docstring_parser_regexes = [(r".*", "docstrings")]
autodoc2_hidden_objects = {"undoc", "dunder", "private", "inherited"}
autodoc2_class_docstring = "both"
autodoc2_replace_annotations = [
    ("torch.Tensor", "Tensor"),
    ("torch.dtype", "dtype"),
    ("torch.device", "device"),
    ("torch.nn.Module", "Module"),
    ("typing.Any", "Any"),
    ("typing.Literal", "Literal"),
    ("collections.abc.Callable", "Callable"),
    ("collections.abc.Sequence", "Sequence"),
    ("collections.abc.Iterable", "Iterable"),
    ("collections.abc.Iterator", "Iterator"),
    ("collections.abc.Mapping", "Mapping"),
    ("pathlib.Path", "Path"),
    ("scoresde.rng.Seed", "Seed"),
    ("scoresde.grids.Grid", "Grid"),
    ("scoresde.sde.SDE", "scoresde.sde.base.SDE"),
    ("scoresde.samplers.Sampler", "scoresde.samplers.base.Sampler"),
    ("scoresde.samplers.FewStep", "scoresde.samplers.few_step.FewStep"),
    ("scoresde.samplers.State", "scoresde.samplers.base.State"),
]
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"scoresde {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
templates_path: list[str] = []
copybutton_exclude = ".linenos, .gp, .go"

mathjax_path = "mathjax/tex-svg.js"  # 3.2.2, kept in _static
mathjax3_config = {
    "options": {"enableMenu": False},  # the menu would load its speech engine from elsewhere
    "svg": {"fontCache": "global"},
}


def write_if_changed(path: Path, text: str) -> None:
    """Leave an unchanged file alone, so that Sphinx does not read it again."""
    path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def copy_notebooks() -> None:
    """../notebooks to ./notebooks, without links to notebooks that are not there (yet)."""
    there = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}

    def link(found: re.Match) -> str:
        if found[2] not in there:
            return found[1]
        return f"[]({found[2]})" if found[1].strip("`") == found[2] else found[0]  # empty: the notebook's title

    for name in sorted(there):
        book = json.loads((ROOT / "notebooks" / name).read_text())
        for cell in book["cells"]:
            if cell["cell_type"] == "markdown":
                text = re.sub(r"\[([^\]]*)\]\(([\w.-]+\.ipynb)\)", link, "".join(cell["source"]))
                cell["source"] = text.replace("](../docs/", "](../")
        write_if_changed(HERE / "notebooks" / name, json.dumps(book))
    for old in (HERE / "notebooks").glob("*.ipynb"):
        if old.name not in there:
            old.unlink()


def commands() -> str:
    """The command line, from the signatures and docstrings that it is made of."""
    from docstrings import arguments_of

    from scoresde.cli.run import COMMANDS

    parts = []
    for name, function in COMMANDS.items():
        about, meaning = arguments_of(inspect.getdoc(function))
        parameters = inspect.signature(function).parameters
        first = "".join(f" {k.upper()}" for k, p in parameters.items() if p.default is p.empty)
        rows = []
        for key, parameter in parameters.items():
            choices = typing.get_args(typing.get_type_hints(function)[key])
            text = meaning.get(key, "")
            if choices and all(isinstance(c, str) for c in choices) and key != "method":
                text += f" One of {', '.join(f'`{c}`' for c in choices)}."
            default = "" if parameter.default in (parameter.empty, None) else f"`{parameter.default}`"
            shown = key.upper() if parameter.default is parameter.empty else f"--{key}"
            rows.append(f"| `{shown}` | {default} | {text} |")
        table = "\n".join(("| argument | default | |", "|---|---|---|", *rows))
        parts.append(f"## {name}\n\n```\nscoresde {name}{first}\n```\n\n{about}\n\n{table}")
    return "\n\n".join(parts)


def fill(app, docname: str, source: list[str]) -> None:
    """The command line's page, from the signatures themselves, so that it cannot differ."""
    if "<!-- commands -->" in source[0]:
        app.env.note_dependency(str(ROOT / "scoresde/cli/commands.py"))
        source[0] = source[0].replace("<!-- commands -->", commands())


def link_names(app, doctree, docname: str) -> None:
    """`ScoreNet` in a text leads to its description."""
    found: dict[str, list] = {}
    for name, entry in app.env.domains["py"].objects.items():
        if entry.objtype in ("class", "exception", "function") and not entry.aliased:
            for key in {name, name.rpartition(".")[2], re.sub(r"^(scoresde\.\w+)\..*\.", r"\1.", name)}:
                found.setdefault(key, []).append(entry)
    for literal in list(doctree.findall(nodes.literal)):
        name = re.sub(r"\(.*\)$", "", literal.astext())  # Exact() and Hadamard(8) too
        entries = {(e.docname, e.node_id) for e in found.get(name, [])}
        plain = name[:1].islower() and "_" not in name and "." not in name  # `sample` may be anything
        around, parent = [], literal.parent
        while parent is not None:
            around.append(parent)
            parent = parent.parent
        if len(entries) != 1 or plain or any(isinstance(p, (nodes.reference, nodes.title)) for p in around):
            continue
        ((target, node_id),) = entries
        own = (p.children[0] for p in around if isinstance(p, addnodes.desc))
        if target == docname and any(node_id in signature["ids"] for signature in own):
            continue
        link = nodes.reference(
            "", "", internal=True, refuri=f"{app.builder.get_relative_uri(docname, target)}#{node_id}"
        )
        literal.replace_self(link)
        link += literal


def without_parent(env, module, parent):
    """autodoc2 takes a class for its own parent and calls it ScoreNet.ScoreNet; none of those here is within another."""
    return parents_set(env, module, None)


parents_set, autodoc._set_parents = autodoc._set_parents, without_parent


def setup(app) -> dict[str, bool]:
    copy_notebooks()
    app.connect("source-read", fill)
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True}
