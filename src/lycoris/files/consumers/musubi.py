"""musubi-tuner (2026): linear layers only."""

from __future__ import annotations

from lycoris.files.consumers import keys
from lycoris.files.consumers.consumer import Consumer, Row
from lycoris.files.consumers.traits import any_of, beside, dora, is_a, moves_bias, no_other_than, w1_split

MUSUBI = Consumer(
    "musubi",
    "musubi-tuner",
    keys.MUSUBI,
    (
        Row(any_of(beside, moves_bias), "not at all", "has no adapters that change a bias"),
        Row(dora, "not at all", "knows no DoRA", "lora"),
        Row(no_other_than("lora", "loha", "lokr"), "not at all", "knows LoRA, LoHa and LoKr only", "lora"),
        Row(w1_split, "not at all", "knows LoKr with a whole w1 only", "whole w1"),
        Row(
            is_a("lokr"),
            "as trained",
            "computes what was trained when it merges; to train on, it has to be told the factor",
        ),
    ),
    kinds=("linear",),
)
