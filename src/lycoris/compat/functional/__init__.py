"""Algorithms as functions of tensors: `weight_gen`, `diff_weight` and `bypass_forward_diff` each.

`backend` names a kernel in lycoris-lora; here there is one way, and it is ignored.
"""
