"""The base class of modules, and functions about layers."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.values import (
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
