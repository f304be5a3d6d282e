"""How a command ends: exit codes, and errors without a stack trace."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lycoris.errors import LycorisError

if TYPE_CHECKING:
    from lycoris.training.train import Outcome

FAILED, INTERRUPTED = 2, 130
DEBUG = "--debug"
NOISY_LOGGERS = ("accelerate", "bitsandbytes", "diffusers", "kernels", "torchao", "transformers", "torch.utils._pytree")
"""Loggers of libraries that warn as they are imported, of things that a user of these commands did not ask for."""

DebugOption = Annotated[bool, typer.Option(DEBUG, help="Show stack traces, and warnings of other libraries.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")]


@contextmanager
def print_errors(debug: bool) -> Iterator[None]:
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


def exit_if_interrupted(outcome: Outcome, command: str) -> None:
    """After Ctrl-C: say what was saved and how to go on with `command`, and exit with 130."""
    if outcome.report is None:
        print(f"interrupted; saved {outcome.checkpoint} and {outcome.adapter}", file=sys.stderr)
        print(f"go on with: {command} --resume latest", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, through whatever links."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def silence_libraries() -> None:
    """Let other libraries say nothing but errors, in this whole process: for the program, not for who imports it."""
    # Two of them set the level of their logger themselves, when they are imported, from these.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in NOISY_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        # Torch sets levels when it is imported; a filter stays.
        logger.addFilter(_is_error)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"lycoris(\..*)?$")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
