"""Norms."""

from lycoris.dropin.functional.general import add_scaled
from lycoris.dropin.messages import warning_once
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import NormModule

__all__ = [
    "LycorisBaseModule",
    "NormModule",
    "add_scaled",
    "warning_once",
]
