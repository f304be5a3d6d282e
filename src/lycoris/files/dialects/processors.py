"""Attention processors of diffusers' old days: LoRA layers that lie beside the projections that they are for.

T-LoRA's authors save such files, frozen copies included; diffusers and XLabs (for Flux.1) saved LoRA so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lycoris.files.dialects.base import Dialect, Key

_PROJECTION = re.compile(
    r"(.+)\.processor\.(to_q|to_k|to_v|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out)_lora\.(.+)"
)
_XLABS = re.compile(r"((?:double|single)_blocks\.\d+\.)processor\.(qkv|proj)_lora([12]?)\.(.+)")
_STREAMS: Mapping[str, str] = {"1": "img_attn.", "2": "txt_attn.", "": ""}
_PLACE = r"(.+)\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


@dataclass(frozen=True)
class Processors(Dialect):
    """Names with the projection inside of the processor's name."""

    def split(self, name: str) -> Key | None:
        moved = of_projection(name)
        return None if moved is None else super().split(moved)

    def join(self, layer: str, suffix: str, prefix: str) -> str:
        place = re.fullmatch(_PLACE, layer)
        assert place is not None, "other layers are refused before"
        own = suffix.removeprefix("lora_") if suffix.startswith("lora_") else suffix
        return f"{prefix}{place[1]}.processor.{place[2].removesuffix('.0')}_lora.{own}"


def of_projection(name: str) -> str | None:
    """The name that the projection itself would have."""
    found = _PROJECTION.fullmatch(name)
    if found is not None:
        layer = f"{found[1]}.{found[2]}{'.0' * (found[2] == 'to_out')}"
        return f"{layer}.{suffix_of(found[3])}"
    found = _XLABS.fullmatch(name.removeprefix("diffusion_model."))
    if found is not None:
        return f"{found[1]}{_STREAMS[found[3]]}{found[2]}.{suffix_of(found[4])}"
    return None


def suffix_of(suffix: str) -> str:
    return f"lora_{suffix}" if suffix in ("down.weight", "up.weight") else suffix


PROCESSORS = Processors(
    name="processors",
    style="dotted",
    prefixes={"unet.": "", "transformer.": "", "": ""},
    scale="in up",
    algorithms=frozenset({"tlora", "lora", "dylora"}),
    kinds=frozenset({"linear"}),
    layers=_PLACE,
)
