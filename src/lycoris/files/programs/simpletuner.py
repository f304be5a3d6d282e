"""SimpleTuner (2026), which trains and loads through LyCORIS 4.1.3."""

from __future__ import annotations

from lycoris.files.programs import keys
from lycoris.files.programs.common import LONE_SHIFT, WITHOUT_BIAS
from lycoris.files.programs.conditions import (
    all_of,
    dora,
    dora_in,
    first_layout,
    is_a,
    kernel,
    lengths,
    lone_bias,
    old_rotation,
    starts_elsewhere,
    without_base,
    without_shift,
)
from lycoris.files.programs.lycoris_lokr import loads_otherwise
from lycoris.files.programs.program import Program, Row

SIMPLETUNER = Program(
    "simpletuner",
    "SimpleTuner",
    keys.SIMPLETUNER,
    (
        Row(is_a("ia3"), "not at all", "stops when it loads an IA3 file", "plain", stops=True),
        Row(lone_bias, "not at all", "recognises no diff_b without diff, and passes it over", "both diffs"),
        Row(
            all_of(is_a("norm"), without_shift),
            "not at all",
            "stops at norms without a bias, which are none of torch's LayerNorm and GroupNorm",
            stops=True,
        ),
        LONE_SHIFT,
        Row(first_layout, "not at all", "knows the later layout of GLoRA only, and stops", "anew", stops=True),
        Row(old_rotation, "not at all", "recognises no oft_diag, and passes it over", "anew"),
        Row(all_of(dora, is_a("full")), "differently", "takes the difference and leaves DoRA's lengths out", "plain"),
        Row(
            loads_otherwise,
            "not at all",
            "makes a LoKr of other shapes than the file's, and stops",
            "plain",
            stops=True,
        ),
        Row(dora_in, "not at all", "cannot load DoRA's lengths of inputs", "plain", stops=True),
        Row(all_of(is_a("tlora"), kernel), "not at all", "cannot run T-LoRA on a convolution with a kernel", "plain"),
        Row(
            all_of(is_a("tlora"), without_base),
            "not known",
            "takes what T-LoRA started from to be the base weight's largest singular triplets, exactly; whether they "
            "are depends on the base weight",
            "plain",
        ),
        Row(
            starts_elsewhere,
            "differently",
            "takes what T-LoRA started from to be the base weight's largest singular triplets, exactly; how far off "
            "that is depends on the base weight",
            "plain",
        ),
        WITHOUT_BIAS,
        Row(
            all_of(is_a("diag-oft"), lengths),
            "as trained",
            "turns the rows as trained; at another strength than 1 their lengths still count fully",
        ),
        Row(
            is_a("boft"),
            "as trained",
            "turns the rows as trained; at another strength than 1 it weakens every rotation instead of their effect",
        ),
        Row(
            dora,
            "as trained",
            "computes what was trained; at another strength than 1 it weakens the lengths, not the change below them",
        ),
    ),
)
