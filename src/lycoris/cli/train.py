"""`lycoris train`"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from lycoris.cli.outcome import DebugOption, exit_if_interrupted, print_errors


def _list_settings(wanted: bool) -> None:
    if wanted:
        from lycoris.training.settings import describe_settings

        print(describe_settings())
        raise typer.Exit


def train_command(
    config: Annotated[Path, typer.Argument(help="config.json: the settings of the run.", show_default=False)],
    output_dir: Annotated[Path | None, typer.Option(help="Overrides output_dir of the config.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="'latest' or a checkpoint folder; overrides resume_from_checkpoint.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing run in output_dir, including its checkpoints.")
    ] = False,
    allow_unsupported: Annotated[
        bool, typer.Option("--allow-unsupported", help="Ignore keys of SimpleTuner that are not supported.")
    ] = False,
    list_settings: Annotated[
        bool,
        typer.Option(
            "--list-settings", help="Print every key of config.json and exit.", callback=_list_settings, is_eager=True
        ),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Train an adapter from a config.json and write a report."""
    with print_errors(debug):
        from lycoris.training.settings import load_recipe, load_settings

        given: dict[str, Any] = {"output_dir": output_dir, "resume_from_checkpoint": resume}
        overrides = {key: value for key, value in given.items() if value is not None}
        settings = load_settings(config, overrides, allow_unsupported=allow_unsupported, say=print)
        # Mistakes in the files are reported before the libraries that training needs are imported, which takes seconds.
        load_recipe(settings.lycoris_config)
        from rich.console import Console

        from lycoris.training import train

        outcome = train.train_adapter(settings, Console(), overwrite=force)
        folder = f" --output-dir {shlex.quote(str(output_dir))}" if output_dir else ""
        allowed = " --allow-unsupported" if allow_unsupported else ""
        exit_if_interrupted(outcome, f"lycoris train {shlex.quote(str(config))}{folder}{allowed}")
