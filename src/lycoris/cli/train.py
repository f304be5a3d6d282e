"""`lycoris train`"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lycoris.cli.outcome import end, plain_errors


def train(
    config: Annotated[Path, typer.Argument(help="config.json: the settings of the run.", show_default=False)],
    output_dir: Annotated[Path | None, typer.Option(help="In place of the config's output_dir.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="'latest' or a checkpoint folder, in place of resume_from_checkpoint.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    """Train an adapter as a config.json says, and report what it does."""
    with plain_errors(debug):
        from lycoris.training import settings, trainer

        given: dict[str, Any] = {"output_dir": output_dir, "resume_from_checkpoint": resume}
        overrides = {key: value for key, value in given.items() if value is not None}
        outcome = trainer.train(settings.load(config, overrides), Console())
        folder = f" --output-dir {shlex.quote(str(output_dir))}" if output_dir else ""
        end(outcome, f"lycoris train {shlex.quote(str(config))}{folder}")
