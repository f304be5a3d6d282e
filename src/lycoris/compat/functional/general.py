"""Building blocks of the algorithms as functions of tensors.

`backend` selects a kernel in lycoris-lora; there is one implementation here, and it is ignored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lycoris.ops.tucker import tucker

FUNC_LIST: tuple[Callable[..., Tensor] | None, ...] = (None, None, F.linear, F.conv1d, F.conv2d, F.conv3d)
"""The function of a layer, indexed by the number of dimensions of its weight."""


def power2factorization(dimension: int, factor: int = -1) -> tuple[int | None, int]:
    """Split a dimension into (m, n) with m·n = dimension, m even and n a power of two.

    m is the largest such number up to `factor` (-1: any). Returns (None, 0) if there is none.
    """
    most = dimension if factor == -1 else min(factor, dimension)
    fitting = (m for m in range(most - most % 2, 0, -2) if dimension % m == 0 and (dimension // m).bit_count() == 1)
    m = next(fitting, None)
    return (None, 0) if m is None else (m, dimension // m)


def butterfly_factor(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Return `power2factorization` of a dimension.

    Raises `ValueError` if there is no such split.
    """
    m, n = power2factorization(dimension, factor)
    if m is None:
        raise ValueError(f"BOFT needs a power of two times an even number of at most {factor}; {dimension} is not")
    return m, n


def rebuild_tucker(t: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
    """Return Σᵢⱼ t[i, j, ...]·wa[i, o]·wb[j, n], of shape (o, n, ...)."""
    return tucker(t, wa.mT, wb)


def tucker_weight(wa: Tensor, wb: Tensor, t: Tensor) -> Tensor:
    """Return the same as `rebuild_tucker`, with the core `t` as the last argument."""
    return rebuild_tucker(t, wa, wb)


def tucker_weight_from_conv(up: Tensor, down: Tensor, mid: Tensor) -> Tensor:
    """Return the kernel (O, I, *K) that three convolutions in sequence are equal to.

    Shapes: up (O, r, 1, ...), down (r, I, 1, ...), mid (r, r, *K).
    """
    return tucker(mid, up.flatten(1), down.flatten(1))


def add_scaled(base: Tensor, delta: Tensor, gamma: float | Tensor = 1.0, backend: str | None = None) -> Tensor:
    """Return base + gamma·delta."""
    return base + delta * gamma


def weight_decompose(
    weight: Tensor, dora_scale: Tensor, multiplier: float = 1, wd_on_out: bool = True, backend: str | None = None
) -> Tensor:
    """Return W·(1 + multiplier·(dora_scale / ‖W‖ - 1)), DoRA's rescaling (arXiv:2402.09353).

    The norm is that of each row if `wd_on_out`, else of each column; `dora_scale` has a matching shape, such as (O, 1).
    The result has the dtype of `dora_scale`.
    """
    weight = weight.to(dora_scale.dtype)
    norm = _compute_axis_norm(weight, 0 if wd_on_out else 1) + torch.finfo(weight.dtype).eps
    return weight * (1 + multiplier * (dora_scale.to(weight.device) / norm - 1))


def apply_dora_scale(org_weight: Tensor, rebuild: Tensor, dora_scale: Tensor, scale: float) -> Tensor:
    """Return W + scale·(V·dora_scale / ‖V‖ - W) with V = W + rebuild.

    The norm is that of each column; `dora_scale` is (1, I, ...).
    """
    weight = (org_weight + rebuild).to(dora_scale.dtype)
    return org_weight + (weight / _compute_axis_norm(weight, 1) * dora_scale - org_weight) * scale


def _compute_axis_norm(weight: Tensor, axis: int) -> Tensor:
    """Return the norm of the weight at each index of an axis, in a shape that broadcasts."""
    return torch.linalg.vector_norm(weight, dim=[at for at in range(weight.dim()) if at != axis], keepdim=True)
