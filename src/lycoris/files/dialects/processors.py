"""The format of diffusers' attention processors: LoRA layers stored next to the projections that they are for.

T-LoRA's authors save such files, frozen copies included; diffusers and XLabs (for Flux.1) once saved LoRA this way.
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
class ProcessorsDialect(Dialect):
    """A dialect in which the projection's name is part of the processor's.

    `attn1.processor.to_q_lora.up.weight` is the up factor of `attn1.to_q`.
    """

    def split(self, name: str) -> Key | None:
        moved = move_to_projection(name)
        return None if moved is None else super().split(moved)

    def join(self, layer: str, suffix: str, prefix: str) -> str:
        place = re.fullmatch(_PLACE, layer)
        assert place is not None, "other layers are refused before"
        own = suffix.removeprefix("lora_") if suffix.startswith("lora_") else suffix
        return f"{prefix}{place[1]}.processor.{place[2].removesuffix('.0')}_lora.{own}"


def move_to_projection(name: str) -> str | None:
    """Return a processor's tensor name as one of the projection itself.

    None if it is not a name of that kind. `a.processor.to_q_lora.up.weight` becomes `a.to_q.lora_up.weight`.
    """
    if ".processor." not in name:
        return None
    found = _PROJECTION.fullmatch(name)
    if found is not None:
        layer = f"{found[1]}.{found[2]}{'.0' * (found[2] == 'to_out')}"
        return f"{layer}.{expand_processor_suffix(found[3])}"
    found = _XLABS.fullmatch(name.removeprefix("diffusion_model."))
    if found is not None:
        return f"{found[1]}{_STREAMS[found[3]]}{found[2]}.{expand_processor_suffix(found[4])}"
    return None


def expand_processor_suffix(suffix: str) -> str:
    """Return LyCORIS' suffix for one that follows `_lora.`.

    `up.weight` becomes `lora_up.weight`; names of other algorithms stay.
    """
    return f"lora_{suffix}" if suffix in ("down.weight", "up.weight") else suffix


PROCESSORS_DIALECT = ProcessorsDialect(
    name="processors",
    style="dotted",
    prefixes={"unet.": "", "transformer.": "", "": ""},
    scale="in up",
    algorithms=frozenset({"tlora", "lora", "dylora"}),
    kinds=frozenset({"linear"}),
    layer_pattern=_PLACE,
)
