"""`lycoris convert`, `lycoris check` and `lycoris detect`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lycoris.cli.outcome import DebugOption, ForceOption, print_errors

BaseOption = Annotated[
    str | None,
    typer.Option(
        help="Base model: a known name such as flux.1-dev, a config.json, or a folder with one (including the weights, "
        "where an export depends on them). By default the file's header and layers decide.",
        show_default=False,
    ),
]


def convert_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An adapter file.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)],
    to: Annotated[
        str | None, typer.Option(help="Dialect: kohya, comfyui, diffusers, lycoris, ...", show_default=False)
    ] = None,
    portable: Annotated[
        str | None,
        typer.Option(help="Program that must load it as trained: comfyui, webui, ...", show_default=False),
    ] = None,
    base: BaseOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the written tensors: fp32, fp16 or bf16; unchanged by default.", show_default=False
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(help="Refuse a file with tensors that cannot be converted; --no-strict drops and reports them."),
    ] = True,
    allow_growth: Annotated[
        bool, typer.Option("--allow-growth", help="Allow the file to grow by more than 10 %.")
    ] = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert an adapter file to the format of another program, without loss or not at all.

    Give a dialect with --to, the program that must load the file with --portable, or both: lycoris convert
    in.safetensors out.safetensors --portable comfyui
    """
    with print_errors(debug):
        from lycoris.cli.plan import parse_dtype
        from lycoris.files import convert as run

        model, weights = open_base(base)
        wanted = None if dtype is None else parse_dtype("dtype", dtype)
        print(
            run(
                *(source, target, to),
                portable=portable,
                base=model,
                weights=weights,
                dtype=wanted,
                strict=strict,
                overwrite=force,
                allow_growth=allow_growth,
            )
        )
        print(target)


def check_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file.", show_default=False)],
    program: Annotated[
        str,
        typer.Option(
            "--for",
            help="comfyui, webui, forge, invokeai, diffusers, peft, simpletuner or musubi.",
            show_default=False,
        ),
    ],
    base: BaseOption = None,
    debug: DebugOption = False,
) -> None:
    """Check whether a program loads an adapter file as it was trained; exit with 1 if not.

    Lists what the program does with each layer, and how to convert the file if that is wrong: lycoris check
    adapter.safetensors --for webui
    """
    with print_errors(debug):
        from lycoris.files import check as run

        found = run(file, program, base=open_base(base)[0])
        print(found)
        if not found.as_trained:
            raise typer.Exit(1)


def detect_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file.", show_default=False)],
    debug: DebugOption = False,
) -> None:
    """Identify an adapter file from its header: format, algorithms, base model.

    The tensors are not read.
    """
    with print_errors(debug):
        from lycoris.files import detect as run

        print(run(file))


def open_base(name: str | None) -> tuple[Any, Any]:
    """Return the base model without weights, and its weights if it is a folder with some.

    (None, None) without a name. Raises `ConfigError` if there is no such model.
    """
    if name is None:
        return None, None
    from lycoris.cli.model import load_empty_model
    from lycoris.files.container.model_weights import BaseWeights

    has = Path(name).is_dir() and any(Path(name).glob("*.safetensors"))
    return load_empty_model(name), BaseWeights.open(name) if has else None
