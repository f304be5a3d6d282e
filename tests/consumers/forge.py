"""Forge: ComfyUI's rules without rotations, with exceptions passed on, and with a limit on what it cannot place."""

from __future__ import annotations

from torch import Tensor

from consumers import Kind, Read, Refused, Tensors, comfyui

UNMATCHED = 12
"""More keys than these that nothing takes, and the whole file is rejected."""


def read(
    tensors: Tensors, weight: Tensor, bias: Tensor | None, kind: Kind, strength: float = 1.0, *, own_names: bool = False
) -> Read | None:
    if kind == "parameter" and not own_names:
        # It looks for these behind diffusion_model. alone.
        return None
    found = comfyui.read(tensors, weight, bias, kind, strength, quiet=False, rotations=False)
    if found is None and len(tensors) > UNMATCHED:
        raise Refused(f"{len(tensors)} keys without a place")
    return found


def accepts(unmatched: int) -> bool:
    """Whether a file with so many keys that nothing takes is loaded at all."""
    return unmatched <= UNMATCHED
