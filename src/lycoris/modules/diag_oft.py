"""Diag-OFT."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.functional.layer import factorization
from lycoris.compat.legacy_options import logger
from lycoris.compat.module_classes import DiagOFTModule

__all__ = [
    "DiagOFTModule",
    "LycorisBaseModule",
    "factorization",
    "logger",
]
