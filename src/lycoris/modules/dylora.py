"""DyLoRA."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.module_classes import DyLoraModule
from lycoris.compat.values import product

__all__ = [
    "DyLoraModule",
    "LycorisBaseModule",
    "product",
]
