"""`lycoris demo`"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lycoris.cli.outcome import DebugOption, exit_if_interrupted, print_errors

NEXT_COMMANDS = (
    ("what a program makes of the file", "lycoris check {adapter} --for comfyui"),
    ("a copy of it as that program likes its names", "lycoris convert {adapter} {out} --portable comfyui"),
    ("what the same settings would cost on a larger model", "lycoris plan sdxl --config {config}"),
)
"""What to try when it is done."""


def demo_command(
    output_dir: Annotated[Path, typer.Option(help="Folder for the adapter, the pictures and the report.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int | None, typer.Option(help="Number of training steps.")] = None,
    resume: Annotated[str | None, typer.Option(help="Checkpoint folder to resume from; the latest by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished run in the folder.")] = False,
    debug: DebugOption = False,
) -> None:
    """Teach a small bundled text-to-image model a new drawing style; takes minutes on a CPU."""
    with print_errors(debug):
        from rich.console import Console

        from lycoris.demo.demo import load_demo_settings
        from lycoris.training import checkpoint, train

        outcome = train.train_adapter(
            load_demo_settings(output_dir, steps=steps, resume=resume), Console(), overwrite=force
        )
        again = f"lycoris demo --output-dir {shlex.quote(str(output_dir))}"
        exit_if_interrupted(outcome, again if steps is None else f"{again} --steps {steps}")
        print("\nNext:\n")
        names = {
            "adapter": outcome.adapter,
            "out": output_dir / "comfyui.safetensors",
            "config": output_dir / checkpoint.CONFIG_FILE,
        }
        paths = {name: shlex.quote(str(path)) for name, path in names.items()}
        for what, command in NEXT_COMMANDS:
            print(f"  {command.format(**paths)}\n      {what}")
