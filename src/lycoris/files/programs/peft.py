"""PEFT (0.21), for a folder that `lycoris.files.peft.write_peft` writes: it reads what that writes, as trained."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from lycoris.adapters.bundle import Bundle
from lycoris.errors import FileError
from lycoris.files.peft.layers import explain_unsupported
from lycoris.files.peft.writing import encode_peft, explain_refusal
from lycoris.files.programs import keys
from lycoris.files.programs.adapter_conditions import changes_bias, has_algorithm, has_dora
from lycoris.files.programs.conditions import all_of
from lycoris.files.programs.program import EXAMINED_TENSORS, Case, Program, Row
from lycoris.layers.geometry import Kind

MAGNITUDE_NOT_SCALED = (
    "computes what was trained; at strengths other than 1 it weakens what is below DoRA's magnitude, not the magnitude"
)


def _is_refused(case: Case) -> bool:
    return bool(_explain_peft_refusal(case))


def _explain_peft_refusal(case: Case) -> str:
    return explain_refusal((case.entry, *case.extra))


def _fits_lora(case: Case) -> bool:
    """Whether a LoRA in its place would be written."""
    g = case.entry.geometry
    return g.kind in ("linear", "conv") and not (explain_unsupported("LORA", g) or changes_bias(case) or case.extra)


def _describe_refusal(case: Case) -> str:
    return f"has no counterpart for {_explain_peft_refusal(case)}"


def explain_folder_conflict(bundle: Bundle) -> str:
    """Return why one PEFT folder cannot hold all these adapters, or "" if it can.

    They may be of two types, or of LoKr for which no one decompose_factor fits. Layers that PEFT refuses alone are left
    out.
    """
    written = {path: stack for path, stack in bundle.entries.items() if not explain_refusal(stack)}
    if not written:
        return ""
    try:
        encode_peft(replace(bundle, entries=written))
    except FileError as error:
        return str(error)
    return ""


PEFT_PROGRAM = Program(
    "peft",
    "PEFT",
    keys.PEFT_KEYS,
    (
        Row(all_of(_is_refused, _fits_lora), "not at all", _describe_refusal, "lora"),
        Row(_is_refused, "not at all", _describe_refusal),
        Row(has_dora, "as trained", MAGNITUDE_NOT_SCALED),
        Row(
            has_algorithm("lokr"),
            "as trained",
            "computes what was trained, if one decompose_factor fits all layers of the file",
        ),
    ),
    kinds=get_args(Kind),
    supports_transposed=True,
    explain_conflict=explain_folder_conflict,
    reads_header=True,
    examined_tensors=EXAMINED_TENSORS | {"oft_R.weight", "ia3_l", "lora_up.bias"},
)
