"""InvokeAI (2026). What it does not know stops the loading."""

from __future__ import annotations

from lycoris.files.programs import keys
from lycoris.files.programs.common import (
    CORES,
    IA3_ON_CONVOLUTIONS,
    LENGTHS_OF_COLUMNS,
    LONE_SHIFT,
    W2_ON_WRONG_AXES,
    WITHOUT_BIAS,
    cores,
)
from lycoris.files.programs.conditions import all_of, dora, dora_out, has_core, is_a, kernel, lone_bias, no_other_than
from lycoris.files.programs.invokeai_newer import NEWER
from lycoris.files.programs.invokeai_routes import ROUTES, refuse
from lycoris.files.programs.program import Case, Program, Row
from lycoris.files.programs.routes import Routed, Sent


def route(sent: Sent) -> Routed:
    """What becomes of a file's keys; a model that is not in the tables is not known to be read."""
    own = {**ROUTES, **NEWER}.get(sent.architecture or "")
    return refuse("is not known to read adapters for this model") if own is None else own(sent)


def _by_rows(case: Case) -> bool:
    """A magnitude of outputs that it reads as one."""
    return case.architecture == "krea2" and "lora_magnitude_vector" in case.stored


def _has_lost_magnitude(case: Case) -> bool:
    """A LoKr whose magnitude it leaves out."""
    return case.architecture == "cosmos-predict2" and case.name == "lokr"


INVOKEAI = Program(
    "invokeai",
    "InvokeAI",
    keys.INVOKEAI,
    (
        Row(is_a("tlora", "glora", "diag-oft", "boft"), "not at all", "knows no such algorithm, and stops", "plain"),
        Row(lone_bias, "not at all", "knows no diff_b without diff, and stops", "both diffs"),
        Row(
            all_of(dora, _has_lost_magnitude),
            "differently",
            "leaves DoRA's magnitude out; how far off that is depends on the base weight",
            "plain",
        ),
        Row(all_of(dora, no_other_than("lora")), "not at all", "knows DoRA over LoRA only, and stops", "plain"),
        Row(all_of(dora, has_core, kernel), "not at all", "leaves the core out under DoRA, and stops", "no core"),
        *IA3_ON_CONVOLUTIONS,
        *cores(CORES),
        W2_ON_WRONG_AXES,
        LONE_SHIFT,
        LENGTHS_OF_COLUMNS._replace(when=all_of(dora_out, lambda case: not _by_rows(case))),
        WITHOUT_BIAS,
    ),
    route=route,
    stops=True,
)
