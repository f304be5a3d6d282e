"""diffusers' format for LoRA: its own dotted names behind the component; the scale is in the header.

Its files of 2023 are read too: LoRA layers of attention processors beside the projections that they are for, and of
text encoders under the names of those processors, with or without the component.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lycoris.files.dialects.base import Dialect, Key, split_dotted
from lycoris.files.dialects.processors import of_projection, suffix_of
from lycoris.files.dialects.suffixes import MAGNITUDE_VECTOR

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

_ENCODER = re.compile(r"(.+\.self_attn)\.(?:(?:[qkv]|out)_proj\.)?to_(q|k|v|out)_lora\.(.+)")


@dataclass(frozen=True)
class Diffusers(Dialect):
    """Names as they are today, or were at first."""

    def split(self, name: str) -> Key | None:
        encoder = _of_encoder(name)
        first = encoder or of_projection(name)
        key = super().split(first or name)
        if key is not None or first is None:
            return key
        parts = split_dotted(first)
        return None if parts is None else Key("", "text_encoder" if encoder else "", *parts)


def _of_encoder(name: str) -> str | None:
    """The name that a text encoder's projection would have."""
    found = _ENCODER.fullmatch(name)
    return None if found is None else f"{found[1]}.{found[2]}_proj.{suffix_of(found[3])}"


DIFFUSERS = Diffusers(
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
