"""Who may import whom: the rooms of the house, walked with ast."""

import ast
import re
import sys
from pathlib import Path

import pytest

import scoresde

ROOT = Path(scoresde.__file__).parent
LAYERS = (
    ("checks", "numerics", "rng", "modes", "progress", "conditions"),
    ("ode", "nets"),
    ("sde", "grids"),
    ("models", "losses", "flow"),
    ("samplers", "latents", "likelihood", "sampling", "distill", "guidance", "metrics", "store"),
    ("data", "jobs", "train", "interop", "plots"),
    ("cli",),
)
ORDER = [room for layer in LAYERS for room in layer]
CORE = {room for layer in LAYERS[:5] for room in layer}
EXEMPT = {"__init__", "_api", "_version", "__main__"}
FILES = sorted(p for p in ROOT.rglob("*.py") if not (p.parent == ROOT and p.stem in EXEMPT))


def room_of(path):
    """The first name below the package: samplers/ode.py and samplers/__init__.py are both `samplers`."""
    part = path.relative_to(ROOT).parts[0]
    return part.removesuffix(".py")


def is_type_checking(node):
    """`if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree, path, everywhere):
    """Dotted names of imported modules, of the whole file or of what runs when it is imported."""
    found, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative to this file's package
                package = ["scoresde", *path.relative_to(ROOT).parts[:-1]]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            # `from scoresde import checks` imports the room checks
            found += [f"{base}.{alias.name}" for alias in node.names] if base == "scoresde" else [base]
        elif everywhere or not (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(node)):
            todo += list(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_earlier_rooms(path):
    """Anywhere in a file, inside functions too, scoresde is imported only from the rooms before its own."""
    room = room_of(path)
    assert room in ORDER, f"{room} has no place in the order of rooms: give it one in tests/test_layers.py"
    for name in imports(ast.parse(path.read_text()), path, everywhere=True):
        parts = name.split(".")
        if parts[0] != "scoresde" or parts[1:] in ([], ["__version__"], ["_version"]):
            continue
        if room == ORDER[-1] and parts[1] in scoresde.__all__:  # the command line stands on the public names
            continue
        assert parts[1] in ORDER, f"{path.name} imports {name}: import from the room that defines it"
        assert ORDER.index(parts[1]) <= ORDER.index(room), f"{room} ({path.name}) must not import {parts[1]}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in CORE], ids=lambda p: str(p.relative_to(ROOT)))
def test_core_needs_only_torch_and_numpy(path):
    """Rooms of layers 0 to 3 import at module level only the standard library, torch and NumPy."""
    for name in imports(ast.parse(path.read_text()), path, everywhere=False):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names | {"torch", "numpy", "scoresde"}, f"{path.name} imports {top}"


def test_one_import_by_name():
    """A model's own methods for files look their room up by name, in one place; nobody else goes around the order."""
    found = {
        str(path.relative_to(ROOT)): re.findall(r"import_module\((.*?)\)", path.read_text())
        for path in FILES
        if "import_module(" in path.read_text()
    }
    assert found.pop("models/base.py") == ['"scoresde.interop"']
    assert found == {"samplers/backends.py": ["name"]}  # other people's packages
    assert not any("__import__" in path.read_text() for path in FILES)


def test_the_order_is_enforced(tmp_path):
    """The walker sees imports inside functions, relative ones, and `from scoresde import room`."""
    source = "import torch.nn\nfrom scoresde import checks\nfrom . import base\ndef f():\n    from scoresde.cli import main\n"
    path = ROOT / "samplers" / "made_up.py"
    names = imports(ast.parse(source), path, everywhere=True)
    assert set(names) == {"torch.nn", "scoresde.checks", "scoresde.samplers", "scoresde.cli"}
    assert "scoresde.cli" not in imports(ast.parse(source), path, everywhere=False)
    assert len(FILES) > 20


def test_ode_and_nets_know_no_diffusion():
    """Layer 0 stands below the SDEs: in the order, and in what the two rooms import."""
    for path in FILES:
        if room_of(path) in ("ode", "nets"):
            used = {
                n.split(".")[1] for n in imports(ast.parse(path.read_text()), path, True) if n.startswith("scoresde.")
            }
            assert used <= {"checks", "numerics", "rng", "modes", "progress", "conditions", room_of(path)}
    assert max(map(ORDER.index, ("ode", "nets"))) < min(map(ORDER.index, ("sde", "grids")))
