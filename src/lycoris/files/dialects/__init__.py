"""How kinds of files write their keys, one table each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lycoris.files.dialects.aitoolkit import AI_TOOLKIT
from lycoris.files.dialects.bare import BARE, PEFT
from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.comfyui import COMFYUI
from lycoris.files.dialects.diffusers import DIFFUSERS
from lycoris.files.dialects.kohya import KOHYA, KOHYA_DIFFUSERS
from lycoris.files.dialects.lycoris import LYCORIS
from lycoris.files.dialects.musubi import MUSUBI, MUSUBI_OTHER
from lycoris.files.dialects.onetrainer import (
    ONETRAINER_COMFY,
    ONETRAINER_DIFFUSERS,
    ONETRAINER_KOHYA,
    ONETRAINER_LEGACY,
    ONETRAINER_ORIGINAL,
)
from lycoris.files.dialects.processors import PROCESSORS

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            PEFT,
            PROCESSORS,
            LYCORIS,
            KOHYA,
            KOHYA_DIFFUSERS,
            MUSUBI,
            ONETRAINER_KOHYA,
            ONETRAINER_LEGACY,
            COMFYUI,
            MUSUBI_OTHER,
            ONETRAINER_COMFY,
            DIFFUSERS,
            ONETRAINER_DIFFUSERS,
            AI_TOOLKIT,
            BARE,
            ONETRAINER_ORIGINAL,
        )
    }
)
"""By name, in the order in which a file is compared with them."""
