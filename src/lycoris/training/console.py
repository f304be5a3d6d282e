"""Printing text to the user's console without interpreting it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def print_verbatim(console: Console, text: str) -> None:
    """Print `text` unchanged.

    Square brackets and colons in paths and captions are not markup or emoji here, nothing is highlighted, and long
    lines are not wrapped.
    """
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
