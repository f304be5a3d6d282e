"""(IA)³."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.module_classes import IA3Module

__all__ = [
    "IA3Module",
    "LycorisBaseModule",
]
