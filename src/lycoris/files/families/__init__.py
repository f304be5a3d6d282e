"""What is known of each family of models, as data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lycoris.files.families import (
    flux1,
    flux2,
    framepack,
    hunyuanvideo,
    hunyuanvideo15,
    language_models,
    lumina2,
    qwen_image,
    sd2,
    sd3,
    sd15,
    sdxl,
    wan,
    z_image,
)
from lycoris.files.families.text_encoders import TEXT_ENCODERS
from lycoris.files.family import Architecture, Family

_MODULES = (
    sd15,
    sd2,
    sdxl,
    sd3,
    flux1,
    flux2,
    qwen_image,
    z_image,
    wan,
    hunyuanvideo,
    hunyuanvideo15,
    framepack,
    lumina2,
    language_models,
)

FAMILIES: Mapping[str, Family] = MappingProxyType({module.FAMILY.name: module.FAMILY for module in _MODULES})
"""By name."""
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {each.name: each for each in (*(each for module in _MODULES for each in module.ARCHITECTURES), *TEXT_ENCODERS)}
)
"""By name: denoisers and language models, then text encoders."""
