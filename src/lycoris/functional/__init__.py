"""Algorithms as functions of tensors."""

from lycoris.dropin.functional.general import (
    FUNC_LIST,
    add_scaled,
    apply_dora_scale,
    power2factorization,
    rebuild_tucker,
    tucker_weight,
    tucker_weight_from_conv,
    weight_decompose,
)
from lycoris.dropin.functional.layer import factorization
from lycoris.functional import boft, diag_oft, general, locon, loha, lokr

__all__ = [
    "FUNC_LIST",
    "add_scaled",
    "apply_dora_scale",
    "boft",
    "diag_oft",
    "factorization",
    "general",
    "locon",
    "loha",
    "lokr",
    "power2factorization",
    "rebuild_tucker",
    "tucker_weight",
    "tucker_weight_from_conv",
    "weight_decompose",
]
