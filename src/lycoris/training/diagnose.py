"""What to try when training became NaN."""

from __future__ import annotations

REMEDIES = """What helps, most likely first:
  SDXL: remove FeedForward from target_module in lycoris_config.json and train Attention only (its feed-forward
    layers are known to overflow)
  lower learning_rate, which is {learning_rate:g}
  mixed_precision "bf16" or "no" instead of "fp16" (it is {mixed_precision!r})"""
