"""Diag-OFT."""

from lycoris.dropin.functional.layer import factorization
from lycoris.dropin.keywords import logger
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import DiagOFTModule

__all__ = [
    "DiagOFTModule",
    "LycorisBaseModule",
    "factorization",
    "logger",
]
