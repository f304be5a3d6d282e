"""SimpleTuner (2026), which trains and loads through LyCORIS 4.1.3."""

from __future__ import annotations

from lycoris.files.programs import keys
from lycoris.files.programs.adapter_conditions import (
    has_algorithm,
    has_dora,
    has_first_glora_layout,
    has_input_magnitude,
    has_kernel,
    has_lone_bias,
    has_old_rotation,
    has_row_magnitude,
    lacks_shift,
    starts_elsewhere,
)
from lycoris.files.programs.common import EXTRA_BIAS_ROW, LONE_SHIFT_ROW
from lycoris.files.programs.conditions import all_of, lacks_base
from lycoris.files.programs.lycoris_lokr import mismatches_rebuilt_lokr
from lycoris.files.programs.program import Program, Row

SIMPLETUNER_PROGRAM = Program(
    "simpletuner",
    "SimpleTuner",
    keys.SIMPLETUNER_KEYS,
    (
        Row(has_algorithm("ia3"), "not at all", "stops when it loads an IA3 file", "smaller", stops=True),
        Row(has_lone_bias, "not at all", "does not recognize diff_b without diff, and passes it over", "both diffs"),
        Row(
            all_of(has_algorithm("norm"), lacks_shift),
            "not at all",
            "stops at norms without a bias, which are none of torch's LayerNorm and GroupNorm",
            stops=True,
        ),
        LONE_SHIFT_ROW,
        Row(
            has_first_glora_layout,
            "not at all",
            "knows the later layout of GLoRA only, and stops",
            "rewritten",
            stops=True,
        ),
        Row(has_old_rotation, "not at all", "does not recognize oft_diag, and passes it over", "rewritten"),
        Row(
            all_of(has_dora, has_algorithm("full")),
            "differently",
            "applies the difference and ignores DoRA's magnitude",
            "smaller",
        ),
        Row(
            mismatches_rebuilt_lokr,
            "not at all",
            "makes a LoKr of other shapes than the file's, and stops",
            "smaller",
            stops=True,
        ),
        Row(has_input_magnitude, "not at all", "cannot load DoRA's input magnitude", "smaller", stops=True),
        Row(
            all_of(has_algorithm("tlora"), has_kernel),
            "not at all",
            "cannot run T-LoRA on a convolution with a kernel",
            "smaller",
        ),
        Row(
            all_of(has_algorithm("tlora"), lacks_base),
            "not known",
            "takes what T-LoRA started from to be the base weight's largest singular triplets, exactly; whether they "
            "are depends on the base weight",
            "smaller",
        ),
        Row(
            starts_elsewhere,
            "differently",
            "takes what T-LoRA started from to be the base weight's largest singular triplets, exactly; how far off "
            "that is depends on the base weight",
            "smaller",
        ),
        EXTRA_BIAS_ROW,
        Row(
            all_of(has_algorithm("diag-oft"), has_row_magnitude),
            "as trained",
            "rotates the rows as trained; at strengths other than 1 their magnitude still counts fully",
        ),
        Row(
            has_algorithm("boft"),
            "as trained",
            "rotates the rows as trained; at strengths other than 1 it weakens every rotation instead of their effect",
        ),
        Row(
            has_dora,
            "as trained",
            "computes what was trained; at strengths other than 1 it weakens the magnitude, not the change below it",
        ),
    ),
)
