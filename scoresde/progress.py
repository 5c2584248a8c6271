"""Progress bars, by tqdm. Layer 0."""

from __future__ import annotations

from typing import Any


def bar(total: int | None, what: str, unit: str, show: bool, *, initial: int = 0, leave: bool = False) -> Any:
    """A tqdm bar, in a notebook's own form where there is one; a silent one if `show` is False."""
    if not show:
        from tqdm import tqdm  # the plain one: the notebook's warns where its widgets are missing
    else:
        from tqdm.auto import tqdm
    return tqdm(total=total, initial=initial, desc=what, unit=unit, leave=leave, mininterval=0.5, disable=not show)
