"""The command line: a table from a word to a typed function. A command parses, calls one function, prints."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lycoris import __version__
from lycoris.cli.convert import check, convert, detect
from lycoris.cli.demo import demo
from lycoris.cli.outcome import DEBUG, silence_libraries
from lycoris.cli.plan import plan
from lycoris.cli.tools import combine, inspect, resize
from lycoris.cli.train import train

app = typer.Typer(
    name="lycoris",
    help="Train and use LyCORIS adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(demo)
app.command()(plan)
app.command()(convert)
app.command()(check)
app.command()(inspect)
app.command()(resize)
app.command()(combine)
app.command()(detect)


def main() -> None:
    """The program `lycoris`."""
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
