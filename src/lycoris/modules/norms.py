"""Norms."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.functional.general import add_scaled
from lycoris.compat.messages import warning_once
from lycoris.compat.module_classes import NormModule

__all__ = [
    "LycorisBaseModule",
    "NormModule",
    "add_scaled",
    "warning_once",
]
