"""Prints what each program makes of each algorithm's file, as measured: `.venv/bin/python -m tests.matrix`.

‖Δ' - Δ‖ / ‖Δ‖ of the change to weight and bias (for PEFT and diffusers: to the output), "-" where a program refuses or
passes over, and where nothing is written for PEFT; "?" where it was not examined; behind
an arrow, the same of what `lycoris convert --portable` writes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parent))

from cases import ALGORITHMS, PAIRS
from contracts.test_programs import Made, change, diffusers_output, error, made, read_by, written_for_peft
from lycoris.algorithms.base import Entry
from lycoris.algorithms.conversion import adapt_affine
from lycoris.errors import FileError
from lycoris.files.programs import PROGRAMS
from lycoris.files.programs.portable import make_portable
from programs import Refused

LAYERS = ("linear", "conv2d", "conv1d", "conv3d")
LEFT_OUT = ("drops", "stable", "scalar")
"""In names of settings that make the same files as others."""


def measured(consumer: str, entry: Entry, case: Made) -> float | None:
    """None where a program does not read it."""
    try:
        if consumer == "diffusers":
            return error(diffusers_output(entry, case) - case.plain, case.adapted - case.plain)
        if consumer == "peft":
            with TemporaryDirectory() as folder:
                return error(written_for_peft(entry, case, Path(folder)) - case.plain, case.adapted - case.plain)
    except (Refused, FileError):
        return None
    found = read_by(consumer, entry, case.base)
    expected = change(adapt_affine(case.entry, case.base), case.base)
    return None if found is None else error(change(found, case.base)[: len(expected)], expected)


def cell(consumer: str, case: Made) -> str:
    if PROGRAMS[consumer].judge(case.entry, case.base).reads == "not known":
        return "?"
    before = measured(consumer, case.entry, case)
    told = "-" if before is None else f"{before:.0e}" if before < 1e-3 else f"{before:.2f}"
    if before is not None and before <= 1e-5:
        return told
    try:
        after = measured(consumer, make_portable(case.entry, consumer, case.base)[0], case)
    except FileError:
        return told
    return told if after is None else f"{told} → {after:.0e}"


def main() -> None:
    """The tables, in Markdown."""
    for layer in LAYERS:
        sys.stdout.write(f"\n## {layer}\n\n| | {' | '.join(PROGRAMS)} |\n|{'---|' * (1 + len(PROGRAMS))}\n")
        for name in ALGORITHMS:
            if (name, layer) in PAIRS and not any(part in name for part in LEFT_OUT):
                torch.manual_seed(0)
                case = made(name, layer)
                sys.stdout.write(f"| {name} | {' | '.join(cell(consumer, case) for consumer in PROGRAMS)} |\n")


if __name__ == "__main__":
    main()
