"""LoRA as functions of tensors."""

from lycoris.dropin.functional.locon import bypass_forward_diff, diff_weight, weight_gen

__all__ = ["bypass_forward_diff", "diff_weight", "weight_gen"]
