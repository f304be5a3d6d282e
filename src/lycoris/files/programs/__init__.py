"""Programs that read adapter files, one module each: what each makes of which adapters, as far as it was examined."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lycoris.files.programs.comfyui import COMFYUI_PROGRAM
from lycoris.files.programs.diffusers import DIFFUSERS_PROGRAM
from lycoris.files.programs.forge import FORGE_PROGRAM
from lycoris.files.programs.invokeai import INVOKEAI_PROGRAM
from lycoris.files.programs.musubi import MUSUBI_PROGRAM
from lycoris.files.programs.peft import PEFT_PROGRAM
from lycoris.files.programs.program import Case, Program, Remedy, Row, Verdict
from lycoris.files.programs.simpletuner import SIMPLETUNER_PROGRAM
from lycoris.files.programs.taking import LayerPlace
from lycoris.files.programs.webui import WEBUI_PROGRAM

PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {
        each.name: each
        for each in (
            COMFYUI_PROGRAM,
            WEBUI_PROGRAM,
            FORGE_PROGRAM,
            INVOKEAI_PROGRAM,
            DIFFUSERS_PROGRAM,
            PEFT_PROGRAM,
            SIMPLETUNER_PROGRAM,
            MUSUBI_PROGRAM,
        )
    }
)

__all__ = ["PROGRAMS", "Case", "LayerPlace", "Program", "Remedy", "Row", "Verdict"]
