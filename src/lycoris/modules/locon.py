"""LoRA and LoCon."""

from lycoris.dropin.functional.general import weight_decompose
from lycoris.dropin.functional.locon import diff_weight
from lycoris.dropin.keywords import logger
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import LoConModule

__all__ = [
    "LoConModule",
    "LycorisBaseModule",
    "diff_weight",
    "logger",
    "weight_decompose",
]
