"""`lycoris inspect`, `resize` and `combine`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lycoris.cli.convert import BaseOption, open_base
from lycoris.cli.outcome import DebugOption, ForceOption, print_errors

InputArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="An adapter file, or a PEFT folder.", show_default=False)
]
OutputArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="Dtype of the written tensors: fp32, fp16 or bf16; unchanged by default.", show_default=False),
]


def inspect_command(
    file: InputArgument,
    base: BaseOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, including every layer.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show what is in an adapter file: format, settings, size, norm and effective rank of each layer.

    With --base and the base model's folder, norms are given relative to the base weights, too.
    """
    with print_errors(debug):
        import json

        from lycoris.tools import inspect as run

        model, weights = open_base(base)
        found = run(file, base=model, weights=weights)
        print(json.dumps(found.as_dict(), indent=1) if as_json else found)


def resize_command(
    source: InputArgument,
    target: OutputArgument,
    rank: Annotated[int | None, typer.Option(help="Rank of each layer.", show_default=False)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of the squared singular values to keep, per layer.", show_default=False)
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Largest relative error allowed per layer.", show_default=False)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="File size, such as 20MB; ranks go to the layers that need them most.", show_default=False),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Reduce the rank of an adapter with the smallest possible error, and report the error.

    Exactly one of --rank, --energy, --error and --size says how much to keep.
    """
    with print_errors(debug):
        from lycoris.cli.plan import parse_dtype
        from lycoris.tools import Limit
        from lycoris.tools import resize as run

        limit = Limit(rank=rank, energy=energy, error=error, size=None if size is None else parse_size(size))
        model, weights = open_base(base)
        wanted = None if dtype is None else parse_dtype("dtype", dtype)
        print(run(source, target, limit, base=model, weights=weights, dtype=wanted, overwrite=force))
        print(target)


def combine_command(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE[:STRENGTH]... OUT", help="Adapter files, then the one to write.", show_default=False
        ),
    ],
    rank: Annotated[int | None, typer.Option(help="Truncate the sum to this rank.", show_default=False)] = None,
    base: BaseOption = None,
    dtype: DtypeOption = None,
    allow_growth: Annotated[
        bool, typer.Option("--allow-growth", help="Allow a result larger than the files together.")
    ] = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Write one adapter file that does what several do together, each at its strength: `combine a:0.7 b:0.4 out`."""
    with print_errors(debug):
        from lycoris.cli.plan import parse_dtype
        from lycoris.errors import ConfigError
        from lycoris.tools import combine as run

        if len(files) < 2:
            raise ConfigError("give the files to combine, and then the file to write: combine a:0.7 b:0.4 out")
        *sources, target = files
        wanted = None if dtype is None else parse_dtype("dtype", dtype)
        print(
            run(
                [parse_source(each) for each in sources],
                target,
                rank=rank,
                base=open_base(base)[0],
                dtype=wanted,
                allow_growth=allow_growth,
                overwrite=force,
            )
        )
        print(target)


def parse_source(text: str) -> tuple[str, float]:
    """Split `FILE:0.7` into the file and its strength, which is 1 by default.

    A colon that no number follows is part of the name.
    """
    name, colon, strength = text.rpartition(":")
    try:
        return (name, float(strength)) if colon and name else (text, 1.0)
    except ValueError:
        return text, 1.0


def parse_size(text: str) -> int:
    """Return the bytes of `20MB`, `1.5 GB`, `300k` or a plain number.

    Units are powers of 1000. Raises `ConfigError` for anything else.
    """
    from lycoris.errors import ConfigError

    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
    number = text.strip().lower().removesuffix("b").strip()
    unit = number[-1:] if number[-1:] in ("k", "m", "g") else ""
    try:
        return int(float(number.removesuffix(unit)) * units[unit])
    except (ValueError, OverflowError):
        raise ConfigError(f"{text!r} is no size; write it as 20MB, 300kB or 1.5GB") from None
