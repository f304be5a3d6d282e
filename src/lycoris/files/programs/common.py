"""Rows that several programs have alike."""

from __future__ import annotations

from lycoris.files.programs.adapter_conditions import (
    has_algorithm,
    has_core,
    has_extra_entries,
    has_lone_shift,
    has_misplaced_w2,
    has_output_magnitude,
    is_input_ia3_on_groups,
    is_not_2d,
    is_output_ia3_on_conv,
    is_output_ia3_on_square_conv1d,
)
from lycoris.files.programs.conditions import all_of
from lycoris.files.programs.errors import misplaced_alone
from lycoris.files.programs.program import Row

CORES_ON_IMAGES = "takes cores on convolutions over two dimensions only"
IA3_CONVOLUTION_ROWS = (
    Row(
        is_output_ia3_on_square_conv1d,
        "differently",
        "takes the factors of the outputs for those of the inputs; how far off that is depends on the base weight",
        "smaller",
    ),
    Row(is_output_ia3_on_conv, "not at all", "cannot apply IA3 to the outputs of a convolution", "smaller"),
    Row(is_input_ia3_on_groups, "not at all", "cannot apply IA3 to the inputs of a convolution with groups", "smaller"),
)
W2_AXES_ROW = Row(
    has_misplaced_w2,
    "differently",
    "pairs the wrong axes of an unsplit w2 on a convolution over one or three dimensions",
    "flat w2",
    misplaced_alone,
)
COLUMN_MAGNITUDE_ROW = Row(
    has_output_magnitude,
    "differently",
    "divides DoRA's magnitude by the norms of the columns, whichever axis it is for; how far off that is depends on "
    "the base weight",
    "smaller",
)
LONE_SHIFT_ROW = Row(has_lone_shift, "not at all", "looks for w_norm, and knows no b_norm without it", "both norms")
EXTRA_BIAS_ROW = Row(has_extra_entries, "differently", "ignores the change of the bias next to it", "joined")


def make_core_rows(why: str) -> tuple[Row, ...]:
    """Make the rows for Tucker cores that only fit convolutions over two dimensions.

    Each has the export that keeps the adapter as small as possible. `why` completes a sentence that begins with the
    program.
    """
    return (
        Row(all_of(has_core, is_not_2d, has_algorithm("lokr")), "not at all", why, "flat w2"),
        Row(all_of(has_core, is_not_2d, has_algorithm("lora")), "not at all", why, "no core"),
        Row(all_of(has_core, is_not_2d), "not at all", why, "smaller"),
    )
