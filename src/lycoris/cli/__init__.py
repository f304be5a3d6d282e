"""The command line: a table from a word to a typed function, which parses, calls one function and prints."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lycoris import __version__
from lycoris.cli.convert import check_command, convert_command, detect_command
from lycoris.cli.demo import demo_command
from lycoris.cli.outcome import DEBUG, silence_libraries
from lycoris.cli.plan import plan_command
from lycoris.cli.tools import combine_command, inspect_command, resize_command
from lycoris.cli.train import train_command

app = typer.Typer(
    name="lycoris",
    help="Train and use LyCORIS adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.command("demo")(demo_command)
app.command("plan")(plan_command)
app.command("convert")(convert_command)
app.command("check")(check_command)
app.command("inspect")(inspect_command)
app.command("resize")(resize_command)
app.command("combine")(combine_command)
app.command("detect")(detect_command)


def main() -> None:
    """Run the program `lycoris`.

    Other libraries are silenced unless `--debug` is given.
    """
    if DEBUG not in sys.argv:
        silence_libraries()
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train and use LyCORIS adapters: LoRA, LoHa, LoKr, T-LoRA, DoRA and more."""
