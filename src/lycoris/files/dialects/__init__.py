"""How each kind of file names its tensors: one table per dialect."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lycoris.files.dialects.aitoolkit import AI_TOOLKIT_DIALECT
from lycoris.files.dialects.bare import BARE_DIALECT, PEFT_DIALECT
from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.comfyui import COMFYUI_DIALECT
from lycoris.files.dialects.diffusers import DIFFUSERS_DIALECT
from lycoris.files.dialects.kohya import KOHYA_DIALECT, KOHYA_DIFFUSERS_DIALECT
from lycoris.files.dialects.lycoris import LYCORIS_DIALECT
from lycoris.files.dialects.musubi import MUSUBI_DIALECT, MUSUBI_OTHER_DIALECT
from lycoris.files.dialects.onetrainer import (
    ONETRAINER_COMFY,
    ONETRAINER_DIFFUSERS,
    ONETRAINER_KOHYA,
    ONETRAINER_LEGACY,
    ONETRAINER_ORIGINAL,
)
from lycoris.files.dialects.processors import PROCESSORS_DIALECT

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            PEFT_DIALECT,
            PROCESSORS_DIALECT,
            LYCORIS_DIALECT,
            KOHYA_DIALECT,
            KOHYA_DIFFUSERS_DIALECT,
            MUSUBI_DIALECT,
            ONETRAINER_KOHYA,
            ONETRAINER_LEGACY,
            COMFYUI_DIALECT,
            MUSUBI_OTHER_DIALECT,
            ONETRAINER_COMFY,
            DIFFUSERS_DIALECT,
            ONETRAINER_DIFFUSERS,
            AI_TOOLKIT_DIALECT,
            BARE_DIALECT,
            ONETRAINER_ORIGINAL,
        )
    }
)
"""By name, in the order in which a file is compared with them."""
