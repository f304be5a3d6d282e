"""LoKr."""

from lycoris.dropin.functional.general import weight_decompose
from lycoris.dropin.functional.layer import factorization
from lycoris.dropin.functional.lokr import kron_bypass, kron_weight
from lycoris.dropin.keywords import logger
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import LokrModule
from lycoris.dropin.values import is_weight_only_fp8_linear

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
