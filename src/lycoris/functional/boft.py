"""BOFT as functions of tensors."""

from lycoris.compat.functional.boft import bypass_forward_diff, diff_weight, weight_gen
from lycoris.compat.functional.diag_oft import get_r
from lycoris.compat.functional.general import FUNC_LIST, power2factorization

__all__ = [
    "FUNC_LIST",
    "bypass_forward_diff",
    "diff_weight",
    "get_r",
    "power2factorization",
    "weight_gen",
]
