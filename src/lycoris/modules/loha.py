"""LoHa."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.functional.general import weight_decompose
from lycoris.compat.module_classes import LohaModule

__all__ = [
    "LohaModule",
    "LycorisBaseModule",
    "weight_decompose",
]
