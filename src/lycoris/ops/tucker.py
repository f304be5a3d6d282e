"""Tucker-2 form of a convolution kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def tucker(core: Tensor, out: Tensor | None, into: Tensor) -> Tensor:
    """W[o, i, ...] = Σ_pq core[p, q, ...] · out[o, p] · into[q, i]; without `out`, W[p, i, ...].

    Shapes: core (P, Q, *K), out (O, P), into (Q, I) → (O, I, *K).
    """
    half = torch.einsum("pq...,qi->pi...", core, into)
    return half if out is None else torch.einsum("pi...,op->oi...", half, out)
