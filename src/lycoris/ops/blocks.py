"""Rows in blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_blocks(rows: Tensor, size: int) -> Tensor | None:
    """Which blocks of `size` consecutive rows some rows are, in their order; None where they cut one up."""
    if len(rows) % size:
        return None
    blocks = rows.reshape(-1, size)
    first = blocks[:, :1]
    if bool((first % size).any()) or not torch.equal(blocks, first + torch.arange(size, device=rows.device)):
        return None
    return first.flatten() // size
