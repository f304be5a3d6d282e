"""Forge (2025), whose rules are ComfyUI's without rotations."""

from __future__ import annotations

from lycoris.files.programs import keys
from lycoris.files.programs.adapter_conditions import (
    has_algorithm,
    has_flat_magnitude,
    has_input_magnitude,
    has_other_algorithm,
    has_strided_core,
    has_unfolded_factors,
    is_linear,
    is_square,
)
from lycoris.files.programs.comfyui import FAILING_ROWS, KRON_FAILS, SHARED_ROWS, STOPPING_CORE_ROWS
from lycoris.files.programs.conditions import all_of, any_of, has_own_names, is_exchanged, is_named, not_
from lycoris.files.programs.program import EXAMINED_ALGORITHMS, EXAMINED_TENSORS, Case, Program, Row
from lycoris.files.programs.replacements import changes_weight, replaces_bias, replaces_weight
from lycoris.files.programs.taking import take_by_forge

MAX_UNMATCHED = 12
"""More keys than these in a file that nothing takes, and it rejects the file."""


def _has_unusable_magnitude(case: Case) -> bool:
    """Lengths as a vector where they do not broadcast over the columns."""
    return (
        has_flat_magnitude(case)
        and case.name != "full"
        and not (is_linear(case) and (has_input_magnitude(case) or is_square(case)))
    )


FORGE_REPLACEMENT_ROWS = (
    Row(
        all_of(replaces_bias, not_(has_own_names), replaces_weight),
        "differently",
        "knows a bias in place of a layer's own behind diffusion_model. only",
        "joined",
    ),
    Row(
        all_of(replaces_bias, not_(has_own_names), changes_weight),
        "differently",
        "knows a bias in place of a layer's own behind diffusion_model. only",
        "joined",
    ),
    Row(
        all_of(replaces_bias, not_(has_own_names)),
        "not at all",
        "knows a bias in place of a layer's own behind diffusion_model. only",
        "joined",
    ),
    Row(
        all_of(replaces_weight, changes_weight),
        "differently",
        "puts the stored weight in place of all that changes the layer's own",
        "joined",
    ),
    Row(
        all_of(replaces_weight, is_exchanged),
        "differently",
        "puts the stored weight in place without exchanging its halves",
        "format",
    ),
)
VECTOR_ROWS = (
    Row(
        _has_unusable_magnitude,
        "not at all",
        "cannot divide a DoRA magnitude that is a vector there, and stops",
        "rewritten",
        stops=True,
    ),
    Row(
        all_of(has_flat_magnitude, is_square, has_other_algorithm("full")),
        "differently",
        "takes a vector of DoRA's magnitude for that of rows and of columns at once; how far off that is depends on "
        "the base weight",
        "rewritten",
    ),
    Row(
        all_of(has_unfolded_factors, any_of(has_algorithm("loha"), has_algorithm("lokr"))),
        "not at all",
        "multiplies matrices, and stops at second factors that keep the kernel's dimensions",
        "rewritten",
        stops=True,
    ),
)
EXCHANGED_ROW = Row(
    all_of(is_exchanged, has_algorithm("full"), changes_weight),
    "differently",
    "adds a dense difference without exchanging its halves",
    "format",
)
TEXT_PROJECTION = r"text_encoder\.text_projection"
TEXT_PROJECTION_ROWS = (
    Row(
        all_of(is_named(TEXT_PROJECTION), has_algorithm("lora", "loha", "lokr", "glora", "replace")),
        "not at all",
        "takes the projection of the first text encoder for that of the second, and stops",
        "format",
        stops=True,
    ),
    Row(
        is_named(TEXT_PROJECTION),
        "not at all",
        "takes the projection of the first text encoder for that of the second, and leaves it out",
        "format",
    ),
)
FORGE_PARAMETER_ROW, *OTHER_SHARED_ROWS = SHARED_ROWS

FORGE_PROGRAM = Program(
    "forge",
    "Forge",
    keys.FORGE_KEYS,
    (
        Row(
            has_algorithm("diag-oft", "boft"),
            "not at all",
            "knows no rotations, and passes their keys over",
            "smaller",
        ),
        FORGE_PARAMETER_ROW,
        *TEXT_PROJECTION_ROWS,
        *FORGE_REPLACEMENT_ROWS,
        *VECTOR_ROWS,
        EXCHANGED_ROW,
        *STOPPING_CORE_ROWS,
        Row(has_strided_core, "not at all", f"{KRON_FAILS}, and stops", "flat w2", stops=True),
        *(row._replace(stops=True) if row in FAILING_ROWS else row for row in OTHER_SHARED_ROWS),
        Row(
            replaces_weight,
            "as trained",
            "puts the stored weight in place of the layer's own, and at strengths other than 1 it does the same",
        ),
        Row(
            replaces_bias,
            "as trained",
            "puts the stored bias in place of the layer's own, and at strengths other than 1 it does the same",
        ),
    ),
    kinds=("linear", "conv", "norm", "embedding", "parameter"),
    examined_algorithms=EXAMINED_ALGORITHMS | {"replace"},
    examined_tensors=EXAMINED_TENSORS | {"scale", "set_weight", "bias.set_weight"},
    supports_replacement=True,
    max_unmatched=MAX_UNMATCHED,
    take_tensors=take_by_forge,
    native_dialect="comfyui",
)
