"""What is known about each family of models, as data: one module per family.

A new family is a new file here, its name in `_MODULES`, and `make models`, which writes its outlines.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lycoris.models.families import (
    auraflow,
    chroma,
    cosmos,
    ernie_image,
    flux1,
    flux2,
    flux3,
    framepack,
    hidream,
    hunyuanimage,
    hunyuanvideo,
    hunyuanvideo15,
    ideogram4,
    kandinsky5,
    krea2,
    language_models,
    ltx,
    ltx2,
    lumina2,
    minimax_h3,
    mochi,
    pixart,
    qwen_image,
    qwen_image_21,
    sana,
    sd2,
    sd3,
    sd15,
    sdxl,
    wan,
    z_image,
)
from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.others import OTHERS
from lycoris.models.families.text_encoders import TEXT_ENCODERS

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
    chroma,
    flux3,
    qwen_image_21,
    auraflow,
    pixart,
    sana,
    hidream,
    hunyuanimage,
    ideogram4,
    krea2,
    ernie_image,
    cosmos,
    ltx,
    ltx2,
    mochi,
    kandinsky5,
    minimax_h3,
    language_models,
)

FAMILIES: Mapping[str, Family] = MappingProxyType({module.FAMILY.name: module.FAMILY for module in _MODULES})
"""By name."""
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {each.name: each for each in (*(each for module in _MODULES for each in module.ARCHITECTURES), *TEXT_ENCODERS)}
)
"""Those of which models are known, by name: denoisers and language models, then text encoders."""

_TEXT = (*language_models.ARCHITECTURES, *TEXT_ENCODERS)
DENOISERS: tuple[Architecture, ...] = (*(each for each in ARCHITECTURES.values() if each not in _TEXT), *OTHERS)
"""All denoisers, the ones without a known model too."""
