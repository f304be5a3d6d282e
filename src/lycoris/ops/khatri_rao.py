"""Khatri-Rao product."""

from __future__ import annotations

from torch import Tensor


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Rows p·Q + q are a[p] ⊙ b[q]. Shapes: a (P, N), b (Q, N) → (P·Q, N)."""
    return (a[:, None, :] * b[None, :, :]).flatten(0, 1)
