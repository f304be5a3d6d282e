"""BOFT as functions of tensors."""

from lycoris.dropin.functional.boft import bypass_forward_diff, diff_weight, weight_gen
from lycoris.dropin.functional.diag_oft import get_r
from lycoris.dropin.functional.general import FUNC_LIST, power2factorization

__all__ = [
    "FUNC_LIST",
    "bypass_forward_diff",
    "diff_weight",
    "get_r",
    "power2factorization",
    "weight_gen",
]
