"""Forge: ComfyUI's rules without rotations, with exceptions passed on, and with a limit on what it cannot place."""

from __future__ import annotations

from torch import Tensor

from programs import Kind, Read, Refused, Tensors, comfyui

UNMATCHED = 12
"""More keys than these that nothing takes, and the whole file is rejected."""


def read(
    tensors: Tensors, weight: Tensor, bias: Tensor | None, kind: Kind, strength: float = 1.0, *, own_names: bool = False
) -> Read | None:
    if kind == "parameter" and not own_names:
        # It looks for these behind diffusion_model. alone.
        return None
    others = {name: tensor for name, tensor in tensors.items() if not name.endswith("set_weight")}
    found = comfyui.read(others, weight, bias, kind, strength, quiet=False, rotations=False)
    found = _replaced(tensors, weight, bias, kind, found, own_names=own_names)
    if found is None and len(tensors) > UNMATCHED:
        raise Refused(f"{len(tensors)} keys without a place")
    return found


def _replaced(
    tensors: Tensors, weight: Tensor, bias: Tensor | None, kind: Kind, found: Read | None, *, own_names: bool
) -> Read | None:
    """At any strength, and whatever else there is for that weight. What ends in bias has a key behind its own names."""
    new, shift = tensors.get("set_weight"), tensors.get("bias.set_weight") if own_names else None
    if new is None and shift is None:
        return found
    before = (weight, bias) if found is None else found
    table = None if new is None else new.T if kind == "embedding" else new
    return before[0] if table is None else table.expand(weight.shape), before[1] if shift is None else shift


def accepts(unmatched: int) -> bool:
    """Whether a file with so many keys that nothing takes is loaded at all."""
    return unmatched <= UNMATCHED
