"""`lycoris demo`"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lycoris.cli.outcome import end, plain_errors


def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the adapter, the pictures and the report.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int | None, typer.Option(help="Training steps, in place of the demo's own number.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="A checkpoint folder to go on from, in place of the latest.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    """Teach a small text-to-image model, which comes with this package, a new drawing style: minutes on a CPU."""
    with plain_errors(debug):
        from lycoris.demo.demo import settings
        from lycoris.training import trainer

        outcome = trainer.train(settings(output_dir, steps=steps, resume=resume), Console())
        again = f"lycoris demo --output-dir {shlex.quote(str(output_dir))}"
        end(outcome, again if steps is None else f"{again} --steps {steps}")
