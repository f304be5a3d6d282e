"""How a command ends: exit codes, and errors without a stack trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from lycoris.errors import LycorisError

if TYPE_CHECKING:
    from lycoris.training.trainer import Outcome

FAILED, INTERRUPTED = 2, 130


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Print the library's own errors to stderr and exit with 2; Ctrl-C exits with 130. `debug` lets them through."""
    try:
        yield
    except LycorisError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def end(outcome: Outcome, command: str) -> None:
    """After Ctrl-C: say what was saved and how to go on with `command`, and exit with 130."""
    if outcome.report is None:
        print(f"interrupted; saved {outcome.checkpoint} and {outcome.adapter}", file=sys.stderr)
        print(f"go on with: {command} --resume latest", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
