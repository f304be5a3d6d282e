"""diffusers (0.42), which runs LoRA through PEFT."""

from __future__ import annotations

from lycoris.files.consumers import keys
from lycoris.files.consumers.consumer import Consumer, Row
from lycoris.files.consumers.peft import LORA, STRENGTH, instead
from lycoris.files.consumers.traits import dora, is_a, no_other_than

DIFFUSERS = Consumer(
    "diffusers",
    "diffusers",
    keys.DIFFUSERS,
    (
        *LORA,
        *instead(is_a("lokr"), "not at all", "reads LoKr for Flux.2 and Z-Image only"),
        *instead(no_other_than("lora"), "not at all", "reads LoRA only"),
        Row(dora, "as trained", f"{STRENGTH}; of dora_scale in files of other formats it leaves the lengths out"),
    ),
    kinds=("linear", "conv"),
)
