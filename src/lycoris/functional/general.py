"""Building blocks of the algorithms, as functions of tensors."""

from lycoris.compat.functional.general import (
    FUNC_LIST,
    add_scaled,
    apply_dora_scale,
    power2factorization,
    rebuild_tucker,
    tucker_weight,
    tucker_weight_from_conv,
    weight_decompose,
)
from lycoris.compat.functional.layer import factorization

__all__ = [
    "FUNC_LIST",
    "add_scaled",
    "apply_dora_scale",
    "factorization",
    "power2factorization",
    "rebuild_tucker",
    "tucker_weight",
    "tucker_weight_from_conv",
    "weight_decompose",
]
