"""Rows that several programs have alike."""

from __future__ import annotations

from lycoris.files.programs.conditions import (
    all_of,
    beside,
    dora_out,
    has_core,
    ia3_in_on_groups,
    ia3_out_on_conv,
    ia3_out_on_square_line,
    is_a,
    lone_shift,
    off_pictures,
    w2_on_wrong_axes,
)
from lycoris.files.programs.errors import misplaced_alone
from lycoris.files.programs.program import Row

CORES = "takes cores on convolutions over two dimensions only"
IA3_ON_CONVOLUTIONS = (
    Row(
        ia3_out_on_square_line,
        "differently",
        "takes the factors of the outputs for those of the inputs; how far off that is depends on the base weight",
        "plain",
    ),
    Row(ia3_out_on_conv, "not at all", "cannot apply IA3 to the outputs of a convolution", "plain"),
    Row(ia3_in_on_groups, "not at all", "cannot apply IA3 to the inputs of a convolution with groups", "plain"),
)
W2_ON_WRONG_AXES = Row(
    w2_on_wrong_axes,
    "differently",
    "pairs the wrong axes of a whole w2 on a convolution over one or three dimensions",
    "flat w2",
    misplaced_alone,
)
LENGTHS_OF_COLUMNS = Row(
    dora_out,
    "differently",
    "divides DoRA's lengths by those of the columns, whichever axis they are for; how far off that is depends on the "
    "base weight",
    "plain",
)
LONE_SHIFT = Row(lone_shift, "not at all", "looks for w_norm, and knows no b_norm without it", "both norms")
WITHOUT_BIAS = Row(beside, "differently", "leaves out the change of the bias that is beside it", "joined")


def cores(why: str) -> tuple[Row, ...]:
    """What cannot be read off pictures, each with the export that keeps most of it."""
    return (
        Row(all_of(has_core, off_pictures, is_a("lokr")), "not at all", why, "flat w2"),
        Row(all_of(has_core, off_pictures, is_a("lora")), "not at all", why, "no core"),
        Row(all_of(has_core, off_pictures), "not at all", why, "plain"),
    )
