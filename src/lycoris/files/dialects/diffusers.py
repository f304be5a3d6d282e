"""diffusers' format for LoRA: its own dotted names behind the component; the scale is in the header."""

from collections.abc import Mapping

from lycoris.files.dialect import Dialect
from lycoris.files.spelling import MAGNITUDE_VECTOR

FACTORS: Mapping[str, str] = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
"""PEFT calls the first factor that the input meets A."""

COMPONENTS: Mapping[str, str] = {
    "transformer.": "",
    "unet.": "",
    "transformer_2.": "transformer_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}

DIFFUSERS = Dialect(
    name="diffusers",
    style="dotted",
    prefixes=COMPONENTS,
    namings={"clip": "text_model"},
    spelling=FACTORS,
    lengths={"out": MAGNITUDE_VECTOR},
    scale="header",
    algorithms=frozenset({"lora", "dylora", "dora"}),
    kinds=frozenset({"linear", "conv"}),
)
