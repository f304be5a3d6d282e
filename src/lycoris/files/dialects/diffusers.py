"""diffusers' format for LoRA: its own dotted names behind the component, with the scale in the header.

Files of 2023 are read too: LoRA layers of attention processors, next to the projections that they are for, and of text
encoders under the names of those processors, with or without the component.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lycoris.files.dialects.base import Dialect, Key, split_dotted_name
from lycoris.files.dialects.processors import expand_processor_suffix, move_to_projection
from lycoris.files.dialects.suffixes import MAGNITUDE_VECTOR

PEFT_SPELLING: Mapping[str, str] = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
"""PEFT calls the first factor that the input meets A."""

COMPONENT_PREFIXES: Mapping[str, str] = {
    "transformer.": "",
    "unet.": "",
    "transformer_2.": "transformer_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}

_ENCODER = re.compile(r"(.+\.self_attn)\.(?:(?:[qkv]|out)_proj\.)?to_(q|k|v|out)_lora\.(.+)")


@dataclass(frozen=True)
class DiffusersDialect(Dialect):
    """A dialect that also reads the names that diffusers used in 2023.

    New files get today's names.
    """

    def split(self, name: str) -> Key | None:
        encoder = _move_to_encoder_projection(name)
        first = encoder or move_to_projection(name)
        key = super().split(first or name)
        if key is not None or first is None:
            return key
        parts = split_dotted_name(first)
        return None if parts is None else Key("", "text_encoder" if encoder else "", *parts)


def _move_to_encoder_projection(name: str) -> str | None:
    """The name that a text encoder's projection would have."""
    found = _ENCODER.fullmatch(name) if "_lora." in name else None
    return None if found is None else f"{found[1]}.{found[2]}_proj.{expand_processor_suffix(found[3])}"


DIFFUSERS_DIALECT = DiffusersDialect(
    name="diffusers",
    style="dotted",
    prefixes=COMPONENT_PREFIXES,
    namings={"clip": "text_model"},
    spelling=PEFT_SPELLING,
    magnitudes={"out": MAGNITUDE_VECTOR},
    scale="header",
    algorithms=frozenset({"lora", "dylora", "dora"}),
    kinds=frozenset({"linear", "conv"}),
)
