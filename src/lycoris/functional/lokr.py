"""LoKr as functions of tensors."""

from lycoris.compat.functional.general import FUNC_LIST, rebuild_tucker
from lycoris.compat.functional.layer import factorization
from lycoris.compat.functional.lokr import (
    bypass_forward_diff,
    diff_weight,
    kron_bypass,
    kron_weight,
    make_kron,
    weight_gen,
)

__all__ = [
    "FUNC_LIST",
    "bypass_forward_diff",
    "diff_weight",
    "factorization",
    "kron_bypass",
    "kron_weight",
    "make_kron",
    "rebuild_tucker",
    "weight_gen",
]
