"""Programs that read adapter files, one file each: what they make of which adapters, as far as it was looked at."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lycoris.files.consumers.comfyui import COMFYUI
from lycoris.files.consumers.consumer import Case, Consumer, Remedy, Row, Verdict
from lycoris.files.consumers.diffusers import DIFFUSERS
from lycoris.files.consumers.forge import FORGE
from lycoris.files.consumers.invokeai import INVOKEAI
from lycoris.files.consumers.musubi import MUSUBI
from lycoris.files.consumers.peft import PEFT
from lycoris.files.consumers.simpletuner import SIMPLETUNER
from lycoris.files.consumers.taking import Place
from lycoris.files.consumers.webui import WEBUI

CONSUMERS: Mapping[str, Consumer] = MappingProxyType(
    {each.name: each for each in (COMFYUI, WEBUI, FORGE, INVOKEAI, DIFFUSERS, PEFT, SIMPLETUNER, MUSUBI)}
)

__all__ = ["CONSUMERS", "Case", "Consumer", "Place", "Remedy", "Row", "Verdict"]
