"""Progress bars, by tqdm. Layer 0."""

from __future__ import annotations

from typing import Any


class Silent:
    """A bar that shows nothing, needs nothing installed and costs nothing per step."""

    def update(self, n: int = 1) -> None:
        """Count nothing."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Say nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        """Close nothing; errors pass."""


def bar(total: int | None, what: str, unit: str, show: bool, *, initial: int = 0, leave: bool = False) -> Any:
    """A tqdm bar, in a notebook's own form where there is one; a `Silent` one if `show` is False. Use it as a context."""
    if not show:
        return Silent()
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=initial, desc=what, unit=unit, leave=leave, mininterval=0.5)
