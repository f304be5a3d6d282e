"""Telling the user something, word for word."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print `text` as it is: square brackets and colons in paths and captions mean nothing, and no line is folded."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
