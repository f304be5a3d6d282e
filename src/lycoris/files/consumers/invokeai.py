"""InvokeAI (2026). What it does not know stops the loading."""

from __future__ import annotations

from lycoris.files.consumers import keys
from lycoris.files.consumers.consumer import Consumer, Row
from lycoris.files.consumers.traits import (
    all_of,
    cored,
    dora,
    dora_out,
    ia3_in_on_groups,
    ia3_out_on_conv,
    ia3_out_on_square_line,
    is_a,
    kernel,
    lone_bias,
    misplaced_alone,
    no_other_than,
    off_pictures,
    w2_on_wrong_axes,
)

CORES = "takes cores on convolutions over two dimensions only"
INVOKEAI = Consumer(
    "invokeai",
    "InvokeAI",
    keys.INVOKEAI,
    (
        Row(is_a("tlora", "glora", "diag-oft", "boft"), "not at all", "knows no such algorithm, and stops", "plain"),
        Row(lone_bias, "not at all", "knows no diff_b without diff, and stops", "both diffs"),
        Row(all_of(dora, no_other_than("lora")), "not at all", "knows DoRA over LoRA only, and stops", "plain"),
        Row(all_of(dora, cored, kernel), "not at all", "leaves the core out under DoRA, and stops", "no core"),
        Row(
            ia3_out_on_square_line,
            "differently",
            "takes the factors of the outputs for those of the inputs; how far off that is depends on the base weight",
            "plain",
        ),
        Row(ia3_out_on_conv, "not at all", "cannot apply IA3 to the outputs of a convolution", "plain"),
        Row(ia3_in_on_groups, "not at all", "cannot apply IA3 to the inputs of a convolution with groups", "plain"),
        Row(all_of(cored, off_pictures, is_a("lokr")), "not at all", CORES, "flat w2"),
        Row(all_of(cored, off_pictures, is_a("lora")), "not at all", CORES, "no core"),
        Row(all_of(cored, off_pictures), "not at all", CORES, "plain"),
        Row(
            w2_on_wrong_axes,
            "differently",
            "pairs the wrong axes of a whole w2 on a convolution over one or three dimensions",
            "flat w2",
            misplaced_alone,
        ),
        Row(
            dora_out,
            "differently",
            "divides DoRA's lengths by those of the columns, whichever axis they are for; how far off that is depends "
            "on the base weight",
            "plain",
        ),
    ),
)
