"""The functions of `lycoris.functional`: `weight_gen`, `diff_weight` and `bypass_forward_diff` of each algorithm.

`backend` selects a kernel in lycoris-lora; there is one implementation here, and it is ignored.
"""
