"""InvokeAI (2026). What it does not know stops the loading."""

from __future__ import annotations

from lycoris.files.programs import keys
from lycoris.files.programs.adapter_conditions import (
    has_algorithm,
    has_core,
    has_dora,
    has_kernel,
    has_lone_bias,
    has_other_algorithm,
    has_output_magnitude,
)
from lycoris.files.programs.common import (
    COLUMN_MAGNITUDE_ROW,
    CORES_ON_IMAGES,
    EXTRA_BIAS_ROW,
    IA3_CONVOLUTION_ROWS,
    LONE_SHIFT_ROW,
    W2_AXES_ROW,
    make_core_rows,
)
from lycoris.files.programs.conditions import all_of
from lycoris.files.programs.invokeai_newer import NEWER_ROUTES
from lycoris.files.programs.invokeai_routes import INVOKEAI_ROUTES, refuse
from lycoris.files.programs.program import Case, Program, Row
from lycoris.files.programs.routes import RoutedKeys, SentFile


def route_invokeai(sent: SentFile) -> RoutedKeys:
    """Return what InvokeAI's converter makes of the keys of a file.

    A model that is not in the tables is refused, since it is not known to be read.
    """
    own = {**INVOKEAI_ROUTES, **NEWER_ROUTES}.get(sent.architecture or "")
    return refuse("is not known to read adapters for this model") if own is None else own(sent)


def _is_krea2_magnitude(case: Case) -> bool:
    """A magnitude of outputs that it reads as one."""
    return case.architecture == "krea2" and "lora_magnitude_vector" in case.stored


def _has_lost_magnitude(case: Case) -> bool:
    """A LoKr whose magnitude it leaves out."""
    return case.architecture == "cosmos-predict2" and case.name == "lokr"


INVOKEAI_PROGRAM = Program(
    "invokeai",
    "InvokeAI",
    keys.INVOKEAI_KEYS,
    (
        Row(
            has_algorithm("tlora", "glora", "diag-oft", "boft"),
            "not at all",
            "knows no such algorithm, and stops",
            "smaller",
        ),
        Row(has_lone_bias, "not at all", "knows no diff_b without diff, and stops", "both diffs"),
        Row(
            all_of(has_dora, _has_lost_magnitude),
            "differently",
            "leaves DoRA's magnitude out; how far off that is depends on the base weight",
            "smaller",
        ),
        Row(
            all_of(has_dora, has_other_algorithm("lora")),
            "not at all",
            "knows DoRA over LoRA only, and stops",
            "smaller",
        ),
        Row(
            all_of(has_dora, has_core, has_kernel), "not at all", "leaves the core out under DoRA, and stops", "no core"
        ),
        *IA3_CONVOLUTION_ROWS,
        *make_core_rows(CORES_ON_IMAGES),
        W2_AXES_ROW,
        LONE_SHIFT_ROW,
        COLUMN_MAGNITUDE_ROW._replace(when=all_of(has_output_magnitude, lambda case: not _is_krea2_magnitude(case))),
        EXTRA_BIAS_ROW,
    ),
    route=route_invokeai,
    stops=True,
)
