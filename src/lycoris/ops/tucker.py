"""Tucker-2 form of a convolution kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """W[o, i, ...] = Σ_pq core[p, q, ...] · out[o, p] · into[q, i].

    Shapes: core (P, Q, *K), out (O, P), into (Q, I) → (O, I, *K).
    """
    return torch.einsum("pq...,op,qi->oi...", core, out, into)
