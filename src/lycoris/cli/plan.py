"""`lycoris plan`"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lycoris.cli.outcome import DebugOption, ForceOption, print_errors, same_file
from lycoris.errors import ConfigError, unknown
from lycoris.json_io import read_json

if TYPE_CHECKING:
    from lycoris.analysis.explain import Explanation
    from lycoris.analysis.memory import Memory

NUMBER_COLUMNS = (0, 3, 4, 5, 6, 7)
"""Columns of the table that are aligned to the right."""

OptionalText = str | None


def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A known model such as flux.1-dev, or a config.json, or the folder it is in.", show_default=False
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="A lycoris_config.json; the options below override it.")] = None,
    algo: Annotated[OptionalText, typer.Option(help="Algorithm, `algo` in the config: lora, loha, lokr, ...")] = None,
    linear_dim: Annotated[int | None, typer.Option(help="Rank.")] = None,
    linear_alpha: Annotated[float | None, typer.Option(help="Alpha; ΔW is multiplied by alpha / rank.")] = None,
    factor: Annotated[int | None, typer.Option(help="Factor of lokr.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other option of the config.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens (or positions) that each layer sees per sample.")] = 1024,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    dtype: Annotated[str, typer.Option(help="Dtype of the base and its activations: bf16, fp16 or fp32.")] = "bf16",
    file_dtype: Annotated[str, typer.Option(help="Dtype of the adapter file: bf16, fp16 or fp32.")] = "fp32",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit, adafactor, lion, prodigy, sgd, ...")] = "adamw",
    report: Annotated[Path | None, typer.Option("--json", help="Write the full plan as JSON to this file.")] = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Estimate what adapters cost on a model: parameters, FLOPs and memory. Needs no weights.

    For example: lycoris plan flux.1-dev --algo lokr --linear-dim 16
    """
    with print_errors(debug):
        from lycoris.targeting.recipe import Recipe

        given = {"algo": algo, "linear_dim": linear_dim, "linear_alpha": linear_alpha, "factor": factor}
        recipe = Recipe.parse(
            _read_plan_config(config)
            | {k: v for k, v in given.items() if v is not None}
            | _parse_settings_options(settings)
        )
        if report is not None:
            _check_report(report, config, model, force)
        # Mistakes in the options are reported before torch is imported, which takes seconds.
        from lycoris.analysis.explain import explain
        from lycoris.analysis.memory import memory
        from lycoris.cli.model import load_empty_model

        own, of_file = parse_dtype("dtype", dtype), parse_dtype("file-dtype", file_dtype)
        base = load_empty_model(model)
        explained = explain(recipe.plan(base), tokens=tokens, dtype=own, file_dtype=of_file)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        needed = memory(explained, parameters, optimizer=optimizer, batch=batch)
        if report is not None:
            content = {"model": model, "base_parameters": parameters, "config": recipe.as_dict()}
            _write_report(report, content | explained.as_dict() | {"batch": batch, "memory": needed.as_dict()})
        _print_report(f"{type(base).__name__}: {parameters:,} parameters", explained, needed, optimizer, batch)


def _read_plan_config(path: Path | None) -> dict[str, Any]:
    return {} if path is None else read_json(path)


def _parse_settings_options(settings: Sequence[str] | None) -> dict[str, Any]:
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


def parse_dtype(option: str, name: str) -> Any:
    """Return the torch dtype of a short name: bf16, fp16 or fp32.

    `option` is named in the error. Raises `ConfigError` for other names.
    """
    import torch

    known: Mapping[str, Any] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name not in known:
        raise ConfigError(unknown(f"--{option}", name, known))
    return known[name]


def _check_report(path: Path, config: Path | None, model: str, force: bool) -> None:
    """Raise `ConfigError` where a report would replace something."""
    for source in filter(None, (config, Path(model), Path(model) / "config.json")):
        if same_file(path, source):
            raise ConfigError(f"{path} is read here; name another file for --json")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file for --json")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; name another file, or overwrite it with --force")


def _write_report(path: Path, content: Mapping[str, Any]) -> None:
    from lycoris.training.jsonfile import write_object

    try:
        write_object(content, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _print_report(heading: str, explained: Explanation, needed: Memory, optimizer: str, batch: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(heading)
    if console.is_terminal:
        (names, *rows) = explained.table()
        # A narrow terminal breaks lines better than it reads columns of broken words.
        widest = [max(map(len, cells)) for cells in zip(names, *rows, strict=True)]
        console.width = max(console.width, sum(widest) + 2 * len(widest))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for at, name in enumerate(names):
            table.add_column(name, justify="right" if at in NUMBER_COLUMNS else "left", no_wrap=True)
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
