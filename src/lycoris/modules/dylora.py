"""DyLoRA."""

from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import DyLoraModule
from lycoris.dropin.values import product

__all__ = [
    "DyLoraModule",
    "LycorisBaseModule",
    "product",
]
