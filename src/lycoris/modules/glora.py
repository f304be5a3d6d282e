"""GLoRA."""

from lycoris.dropin.functional.general import tucker_weight_from_conv
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import GLoRAModule

__all__ = [
    "GLoRAModule",
    "LycorisBaseModule",
    "tucker_weight_from_conv",
]
