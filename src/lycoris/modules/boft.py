"""BOFT."""

from lycoris.dropin.functional.general import butterfly_factor, power2factorization
from lycoris.dropin.keywords import logger
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import ButterflyOFTModule

__all__ = [
    "ButterflyOFTModule",
    "LycorisBaseModule",
    "butterfly_factor",
    "logger",
    "power2factorization",
]
