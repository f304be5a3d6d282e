"""Programs that read adapter files, one file each: what they make of which adapters, as far as it was looked at."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lycoris.files.programs.comfyui import COMFYUI
from lycoris.files.programs.diffusers import DIFFUSERS
from lycoris.files.programs.forge import FORGE
from lycoris.files.programs.invokeai import INVOKEAI
from lycoris.files.programs.musubi import MUSUBI
from lycoris.files.programs.peft import PEFT
from lycoris.files.programs.program import Case, Program, Remedy, Row, Verdict
from lycoris.files.programs.simpletuner import SIMPLETUNER
from lycoris.files.programs.taking import Place
from lycoris.files.programs.webui import WEBUI

PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {each.name: each for each in (COMFYUI, WEBUI, FORGE, INVOKEAI, DIFFUSERS, PEFT, SIMPLETUNER, MUSUBI)}
)

__all__ = ["PROGRAMS", "Case", "Place", "Program", "Remedy", "Row", "Verdict"]
