"""Diag-OFT as functions of tensors."""

from lycoris.compat.functional.diag_oft import bypass_forward_diff, diff_weight, get_r, weight_gen
from lycoris.compat.functional.layer import factorization

__all__ = [
    "bypass_forward_diff",
    "diff_weight",
    "factorization",
    "get_r",
    "weight_gen",
]
