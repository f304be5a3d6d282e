"""(IA)³."""

from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import IA3Module

__all__ = [
    "IA3Module",
    "LycorisBaseModule",
]
