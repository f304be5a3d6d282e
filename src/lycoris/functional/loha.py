"""LoHa as functions of tensors."""

from lycoris.compat.functional.general import FUNC_LIST
from lycoris.compat.functional.loha import bypass_forward_diff, diff_weight, make_weight, make_weight_tucker, weight_gen

__all__ = [
    "FUNC_LIST",
    "bypass_forward_diff",
    "diff_weight",
    "make_weight",
    "make_weight_tucker",
    "weight_gen",
]
