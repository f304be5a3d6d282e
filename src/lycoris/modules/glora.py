"""GLoRA."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.functional.general import tucker_weight_from_conv
from lycoris.compat.module_classes import GLoRAModule

__all__ = [
    "GLoRAModule",
    "LycorisBaseModule",
    "tucker_weight_from_conv",
]
