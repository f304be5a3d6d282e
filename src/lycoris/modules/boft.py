"""BOFT."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.functional.general import butterfly_factor, power2factorization
from lycoris.compat.legacy_options import logger
from lycoris.compat.module_classes import ButterflyOFTModule

__all__ = [
    "ButterflyOFTModule",
    "LycorisBaseModule",
    "butterfly_factor",
    "logger",
    "power2factorization",
]
