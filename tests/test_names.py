"""No public name hides a module, and what a room says it offers is there."""

import importlib
import pkgutil
import types

import pytest

import scoresde

NEEDS = {"diffusers"}  # modules that import one of these are left out where it is not installed


def modules():
    """Every module of the package, imported, by its dotted name."""
    found = {"scoresde": scoresde}
    for info in pkgutil.walk_packages(scoresde.__path__, "scoresde."):
        try:
            found[info.name] = importlib.import_module(info.name)
        except ModuleNotFoundError as e:
            if (e.name or "").partition(".")[0] not in NEEDS:
                raise
    return found


def test_no_name_hides_a_module():
    """`import scoresde.sampling as s` and `scoresde.sampling` are the module, whatever was imported before or after."""
    found = modules()
    assert len(found) > 60
    hiding = set()
    for name, module in found.items():
        package, _, last = name.rpartition(".")
        if package and getattr(found[package], last) is not module:
            hiding.add(name)
    assert not hiding


@pytest.mark.parametrize("name", [n for n, m in modules().items() if hasattr(m, "__all__")])
def test_what_is_offered_is_there(name):
    """`__all__` lists each name once, and none of them is a module."""
    module = modules()[name]
    assert len(set(module.__all__)) == len(module.__all__)
    for offered in module.__all__:
        assert not isinstance(getattr(module, offered), types.ModuleType)
