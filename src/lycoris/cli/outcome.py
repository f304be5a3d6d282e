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
    """Print the library's own errors to stderr and exit with 2; on Ctrl-C exit with 130.

    A context manager. With `debug` exceptions propagate, with their stack traces.
    """
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
    """Exit with 130 after a run that Ctrl-C stopped, saying what was saved and how to resume.

    Returns if the run was finished. `command` is what to run again, without `--resume`.
    """
    if outcome.report is None:
        print(f"interrupted; saved {outcome.checkpoint} and {outcome.adapter}", file=sys.stderr)
        print(f"resume with: {command} --resume latest", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same file, through whatever links.

    False if either does not exist.
    """
    try:
        return one.samefile(other)
    except OSError:
        return False


def silence_libraries() -> None:
    """Silence everything but errors of other libraries, in this process.

    For the program, not for those who import this package: it changes loggers, warnings and environment variables.
    """
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
