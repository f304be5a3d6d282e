"""`lycoris plan`"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lycoris.cli.outcome import plain_errors
from lycoris.errors import ConfigError, unknown
from lycoris.jsons import json_object

if TYPE_CHECKING:
    from lycoris.explain import Explanation
    from lycoris.memory import Memory

NUMBERS = (0, 3, 4, 5, 6, 7)
"""Columns of the table that are aligned to the right."""

Text = str | None


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A known model such as flux.1-dev, or a config.json, or the folder it is in.", show_default=False
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="lycoris_config.json; options below come over it.")] = None,
    algo: Annotated[Text, typer.Option(help="lora, loha, lokr, ...: `algo` of the config.")] = None,
    linear_dim: Annotated[int | None, typer.Option(help="Rank.")] = None,
    linear_alpha: Annotated[float | None, typer.Option(help="ΔW is multiplied by alpha / rank.")] = None,
    factor: Annotated[int | None, typer.Option(help="Of lokr.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other option of the config.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens, or positions, that every layer sees in a pass.")] = 1024,
    batch: Annotated[int, typer.Option(help="Passes at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the base and its activations: bf16, fp16 or fp32.")] = "bf16",
    file_dtype: Annotated[str, typer.Option(help="Of the adapter's file.")] = "fp32",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit, adafactor, lion, prodigy, sgd, ...")] = "adamw",
    report: Annotated[Path | None, typer.Option("--json", help="Write all of it, layer by layer, here.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    """What adapters would cost on a model, layer by layer and in memory. Needs no weights."""
    with plain_errors(debug):
        from lycoris.cli.model import empty
        from lycoris.explain import explain
        from lycoris.memory import memory
        from lycoris.recipe import Recipe

        given = {"algo": algo, "linear_dim": linear_dim, "linear_alpha": linear_alpha, "factor": factor}
        recipe = Recipe.parse(_config(config) | {k: v for k, v in given.items() if v is not None} | _set(settings))
        own, of_file = precision("dtype", dtype), precision("file-dtype", file_dtype)
        base = empty(model)
        explained = explain(recipe.plan(base), tokens=tokens, dtype=own, file_dtype=of_file)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        needed = memory(explained, parameters, optimizer=optimizer, batch=batch)
        if report is not None:
            whole = {"model": model, "base_parameters": parameters, "config": recipe.as_dict()}
            _write(report, whole | explained.as_dict() | {"batch": batch, "memory": needed.as_dict()})
        _print(f"{type(base).__name__}: {parameters:,} parameters", explained, needed, optimizer, batch)


def _config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return json_object(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a JSON object of options: {error}") from error


def _set(settings: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON where it is some, else as text."""
    found: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes NAME=VALUE, such as --set dora_wd=true, not {setting!r}")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def precision(option: str, name: str) -> Any:
    """A precision by its short name. Raises `ConfigError` for another."""
    import torch

    known: Mapping[str, Any] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name not in known:
        raise ConfigError(unknown(f"--{option}", name, known))
    return known[name]


def _write(path: Path, whole: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(whole, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _print(heading: str, explained: Explanation, needed: Memory, optimizer: str, batch: int) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(heading)
    if console.is_terminal:
        (names, *rows) = explained.table()
        # A narrow terminal breaks lines better than it reads columns of broken words.
        widest = [max(map(len, cells)) for cells in zip(names, *rows, strict=True)]
        console.width = max(console.width, sum(widest) + 2 * len(widest))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for at, name in enumerate(names):
            table.add_column(name, justify="right" if at in NUMBERS else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print("\n".join([*explained.totals(), *explained.reasons()]))
        console.print("".join(f"note: {remark}\n" for remark in explained.remarks), end="")
    else:
        console.print(str(explained))
    console.print(f"\nin training, {batch} x {explained.tokens} tokens, {optimizer}:\n{needed}")
    console.print(
        "Not counted: what the base itself keeps for backward (attention, activations, norms), temporary buffers, text "
        "encoders and VAE. Every layer is taken to see all tokens, and gradient checkpointing is taken to be off."
    )
