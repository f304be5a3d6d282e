"""LoRA as functions of tensors."""

from lycoris.compat.functional.general import FUNC_LIST, rebuild_tucker
from lycoris.compat.functional.locon import bypass_forward_diff, diff_weight, weight_gen

__all__ = [
    "FUNC_LIST",
    "bypass_forward_diff",
    "diff_weight",
    "rebuild_tucker",
    "weight_gen",
]
