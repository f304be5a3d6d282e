"""Finding out where NaN or infinity began."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

REMEDIES = """What helps, most likely first:
  SDXL: remove FeedForward from target_module in lycoris_config.json and train Attention only (its feed-forward
    layers are known to overflow)
  lower learning_rate, which is {learning_rate:g}
  mixed_precision "bf16" or "no" instead of "fp16" (it is {mixed_precision!r})"""


def first_bad_module(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Call `run`, which uses `model`, and name the first module to return NaN or infinity; None when all is finite.

    Modules finish innermost first, so the name is that of the layer, not of the blocks around it.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_bad_gradient(model: nn.Module) -> str | None:
    """Name the first parameter whose gradient is not finite; None when all are."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return None


def _finite(output: Any) -> bool:
    if isinstance(output, torch.Tensor):
        return not output.is_floating_point() or bool(output.isfinite().all())
    if isinstance(output, dict):
        return all(_finite(value) for value in output.values())
    if isinstance(output, (tuple, list)):
        return all(_finite(value) for value in output)
    return True
