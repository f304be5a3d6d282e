"""InvokeAI (2026). What it does not know stops the loading."""

from __future__ import annotations

from lycoris.files.consumers import keys
from lycoris.files.consumers.consumer import Consumer, Row
from lycoris.files.consumers.invokeai_routes import route
from lycoris.files.consumers.shared import (
    CORES,
    IA3_ON_CONVOLUTIONS,
    LENGTHS_OF_COLUMNS,
    LONE_SHIFT,
    W2_ON_WRONG_AXES,
    WITHOUT_BIAS,
    cores,
)
from lycoris.files.consumers.traits import (
    all_of,
    cored,
    dora,
    is_a,
    kernel,
    lone_bias,
    no_other_than,
)

INVOKEAI = Consumer(
    "invokeai",
    "InvokeAI",
    keys.INVOKEAI,
    (
        Row(is_a("tlora", "glora", "diag-oft", "boft"), "not at all", "knows no such algorithm, and stops", "plain"),
        Row(lone_bias, "not at all", "knows no diff_b without diff, and stops", "both diffs"),
        Row(all_of(dora, no_other_than("lora")), "not at all", "knows DoRA over LoRA only, and stops", "plain"),
        Row(all_of(dora, cored, kernel), "not at all", "leaves the core out under DoRA, and stops", "no core"),
        *IA3_ON_CONVOLUTIONS,
        *cores(CORES),
        W2_ON_WRONG_AXES,
        LONE_SHIFT,
        LENGTHS_OF_COLUMNS,
        WITHOUT_BIAS,
    ),
    route=route,
    stops=True,
)
