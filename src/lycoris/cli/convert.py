"""`lycoris convert`, `lycoris check` and `lycoris detect`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lycoris.cli.outcome import Debug, Force, plain_errors

Base = Annotated[
    str | None,
    typer.Option(
        help="The denoiser that the file is for: a known model such as flux.1-dev, a config.json, or a folder with one "
        "(with weights in it, for exports that depend on them). Without it, the file's header and layers tell.",
        show_default=False,
    ),
]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An adapter file.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)],
    to: Annotated[
        str | None, typer.Option(help="Dialect: kohya, comfyui, diffusers, lycoris, ...", show_default=False)
    ] = None,
    portable: Annotated[
        str | None,
        typer.Option(help="Program that is to read it as trained: comfyui, webui, ...", show_default=False),
    ] = None,
    base: Base = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the tensors: fp32, fp16 or bf16; as they are.", show_default=False)
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Refuse a file in which something has no place; --no-strict leaves it out and says so.")
    ] = True,
    allow_growth: Annotated[
        bool, typer.Option("--allow-growth", help="Write a file that becomes more than 10 % larger, too.")
    ] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write an adapter file anew, as another program names its keys, exactly or not at all."""
    with plain_errors(debug):
        from lycoris.cli.plan import precision
        from lycoris.files import convert as run

        model, weights = open_base(base)
        wanted = None if dtype is None else precision("dtype", dtype)
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


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file.", show_default=False)],
    program: Annotated[
        str,
        typer.Option(
            "--for",
            help="comfyui, webui, forge, invokeai, diffusers, peft, simpletuner or musubi.",
            show_default=False,
        ),
    ],
    base: Base = None,
    debug: Debug = False,
) -> None:
    """Whether a program reads an adapter file as it was trained. Exits with 1 when it does not."""
    with plain_errors(debug):
        from lycoris.files import check as run

        found = run(file, program, base=open_base(base)[0])
        print(found)
        if not found.as_trained:
            raise typer.Exit(1)


def detect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file.", show_default=False)],
    debug: Debug = False,
) -> None:
    """What an adapter file is, from its header alone: format, algorithms, base model."""
    with plain_errors(debug):
        from lycoris.files import detect as run

        print(run(file))


def open_base(name: str | None) -> tuple[Any, Any]:
    """The model without weights, and its weights where a folder has them."""
    if name is None:
        return None, None
    from lycoris.cli.model import empty
    from lycoris.files.container.model_weights import BaseWeights

    has = Path(name).is_dir() and any(Path(name).glob("*.safetensors"))
    return empty(name), BaseWeights.open(name) if has else None
