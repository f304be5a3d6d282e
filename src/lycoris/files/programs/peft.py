"""PEFT (0.21), for a folder that `lycoris.files.peft.write_peft` writes: it reads what that writes, as trained."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from lycoris.adapters.bundle import Bundle
from lycoris.errors import FileError
from lycoris.files.peft.layers import unlike
from lycoris.files.peft.writing import encode_peft, refusal
from lycoris.files.programs import keys
from lycoris.files.programs.conditions import all_of, changes_bias, dora, is_a
from lycoris.files.programs.program import NAMES, Case, Program, Row
from lycoris.layers.geometry import Kind

STRENGTH = "computes what was trained; at another strength than 1 it weakens what is below DoRA's lengths, not these"


def is_refused(case: Case) -> bool:
    return bool(_why(case))


def _why(case: Case) -> str:
    return refusal((case.entry, *case.beside))


def fits_lora(case: Case) -> bool:
    """Whether a LoRA in its place would be written."""
    g = case.entry.geometry
    return g.kind in ("linear", "conv") and not (unlike("LORA", g) or changes_bias(case) or case.beside)


def counterpart(case: Case) -> str:
    return f"has no counterpart for {_why(case)}"


def together(bundle: Bundle) -> str:
    """Why one folder does not hold them all: of two kinds, or with no one decompose_factor."""
    written = {path: stack for path, stack in bundle.entries.items() if not refusal(stack)}
    if not written:
        return ""
    try:
        encode_peft(replace(bundle, entries=written))
    except FileError as error:
        return str(error)
    return ""


PEFT = Program(
    "peft",
    "PEFT",
    keys.PEFT,
    (
        Row(all_of(is_refused, fits_lora), "not at all", counterpart, "lora"),
        Row(is_refused, "not at all", counterpart),
        Row(dora, "as trained", STRENGTH),
        Row(
            is_a("lokr"),
            "as trained",
            "computes what was trained, if one decompose_factor fits all layers of the file",
        ),
    ),
    kinds=get_args(Kind),
    transposes=True,
    whole=together,
    reads_header=True,
    names=NAMES | {"oft_R.weight", "ia3_l", "lora_up.bias"},
)
