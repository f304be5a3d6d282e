"""Adding the product of a low-rank matrix to something that is there already."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lycoris.ops.shape import unflatten

FEW_OUTPUTS = 1 << 16
"""Numbers below which one more pass costs less than telling torch to save it."""


def add_product(y: Tensor, h: Tensor, out: Tensor) -> Tensor:
    """Return y + h·outᵀ in one pass over y, which is not changed.

    The result has the dtype of y. Shapes: y (..., O), h (..., r), out (O, r).
    """
    if y.numel() < FEW_OUTPUTS:
        return y + F.linear(h, out).to(y.dtype)
    rows = y.reshape(-1, y.shape[-1])
    return unflatten(torch.addmm(rows, h.reshape(-1, h.shape[-1]), out.T), y.shape).to(y.dtype)


def low_rank_gram(weight: Tensor, out: Tensor, into: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """⟨W, Δ⟩ and ‖Δ‖² for Δ = out·into, over all axes but `axis` (0 or 1), without building Δ.

    Shapes: weight (O, I, *K), out (O, r), into (r, I, *K) → (O) and (O), or (I) and (I), in at least float32.
    """
    if axis == 0:
        return _row_gram(weight.flatten(1), out, into.flatten(1))
    found = _row_gram(weight.flatten(1).T, into.flatten(1).T, out.T)
    return tuple(each.reshape(weight.shape[1], -1).sum(1) for each in found)  # type: ignore[return-value]


def _row_gram(weight: Tensor, out: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    inner = (out.to(wide) * (weight @ into.to(weight.dtype).T).to(wide)).sum(1)
    out, into = out.to(wide), into.to(wide)
    return inner, ((out @ (into @ into.T)) * out).sum(1)
