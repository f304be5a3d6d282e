"""LoKr."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.functional.general import weight_decompose
from lycoris.compat.functional.layer import factorization
from lycoris.compat.functional.lokr import kron_bypass, kron_weight
from lycoris.compat.legacy_options import logger
from lycoris.compat.module_classes import LokrModule
from lycoris.compat.values import is_weight_only_fp8_linear

__all__ = [
    "LokrModule",
    "LycorisBaseModule",
    "factorization",
    "is_weight_only_fp8_linear",
    "kron_bypass",
    "kron_weight",
    "logger",
    "weight_decompose",
]
