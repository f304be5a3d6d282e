"""LoHa."""

from lycoris.dropin.functional.general import weight_decompose
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import LohaModule

__all__ = [
    "LohaModule",
    "LycorisBaseModule",
    "weight_decompose",
]
