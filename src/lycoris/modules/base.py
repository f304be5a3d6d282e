"""What the module classes have in common."""

from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.values import (
    dequantize_weight_only_fp8,
    is_linear_like_module,
    is_supported_linear_module,
    is_weight_only_fp8_linear,
)

__all__ = [
    "LycorisBaseModule",
    "dequantize_weight_only_fp8",
    "is_linear_like_module",
    "is_supported_linear_module",
    "is_weight_only_fp8_linear",
]
