"""Weights stored as codes times a scale per block, W[o, i] = scale[block of o, i] · code[o, i]."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Return a scale per block, (blocks along O, blocks along I, ...), repeated over its block.

    A single scale becomes a 0-d tensor. An axis with one block stays 1 and broadcasts.

    Args:
        shape: the shape of the weight; its sizes must be multiples of the numbers of blocks.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    scale = scale.reshape(scale.shape[: len(shape)])
    for axis, (size, blocks) in enumerate(zip(shape, scale.shape, strict=True)):
        if blocks not in (1, size):
            scale = scale.repeat_interleave(size // blocks, dim=axis)
    return scale


def widen_scale(scale: Tensor, dense: Tensor, limit: float) -> Tensor:
    """The scale, larger where the new weight would not fit into ±limit codes, in its own dtype.

    Kept where it does fit: what an adapter left alone is then stored exactly as before.
    """
    peak = dense.abs()
    if scale.numel() == 1:
        peak = peak.amax()
    for axis, blocks in enumerate(scale.shape if scale.numel() > 1 else ()):
        peak = peak.reshape(*peak.shape[:axis], blocks, -1, *peak.shape[axis + 1 :]).amax(axis + 1)
    needed = (peak / limit).to(scale).reshape(scale.shape)
    # Not for the last bit of a division.
    return torch.where(needed > scale * (1 + 1e-6), needed, scale)
