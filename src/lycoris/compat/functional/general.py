"""What the algorithms are made of, as functions of tensors.

`backend` names a kernel in lycoris-lora; here there is one way, and it is ignored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lycoris.ops.tucker import tucker

FUNC_LIST: tuple[Callable[..., Tensor] | None, ...] = (None, None, F.linear, F.conv1d, F.conv2d, F.conv3d)
"""The function of a layer by the dimensions of its weight."""


def power2factorization(dimension: int, factor: int = -1) -> tuple[int | None, int]:
    """(m, n) with m·n the dimension, m even, as large as it can be and at most `factor` (-1: any), n a power of two.

    (None, 0) where there are no such two.
    """
    most = dimension if factor == -1 else min(factor, dimension)
    fitting = (m for m in range(most - most % 2, 0, -2) if dimension % m == 0 and (dimension // m).bit_count() == 1)
    m = next(fitting, None)
    return (None, 0) if m is None else (m, dimension // m)


def butterfly_factor(dimension: int, factor: int = -1) -> tuple[int, int]:
    """The same. Raises `ValueError` where there are no such two."""
    m, n = power2factorization(dimension, factor)
    if m is None:
        raise ValueError(f"{dimension} is no even number of at most {factor} times a power of two, as BOFT needs")
    return m, n


def rebuild_tucker(t: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
    """Σ t[i, j, ...]·wa[i, o]·wb[j, n]: (o, n, ...)."""
    return tucker(t, wa.mT, wb)


def tucker_weight(wa: Tensor, wb: Tensor, t: Tensor) -> Tensor:
    """The same, with the core last."""
    return rebuild_tucker(t, wa, wb)


def tucker_weight_from_conv(up: Tensor, down: Tensor, mid: Tensor) -> Tensor:
    """The same from the weights of three convolutions: up (O, r, 1, ...), down (r, I, 1, ...), mid (r, r, *K)."""
    return tucker(mid, up.flatten(1), down.flatten(1))


def add_scaled(base: Tensor, delta: Tensor, gamma: float | Tensor = 1.0, backend: str | None = None) -> Tensor:
    """base + gamma·delta."""
    return base + delta * gamma


def weight_decompose(
    weight: Tensor, dora_scale: Tensor, multiplier: float = 1, wd_on_out: bool = True, backend: str | None = None
) -> Tensor:
    """W·(1 + multiplier·(dora_scale / ‖W‖ - 1)), the norm that of each row or, not `wd_on_out`, of each column."""
    weight = weight.to(dora_scale.dtype)
    norm = _norm(weight, 0 if wd_on_out else 1) + torch.finfo(weight.dtype).eps
    return weight * (1 + multiplier * (dora_scale.to(weight.device) / norm - 1))


def apply_dora_scale(org_weight: Tensor, rebuild: Tensor, dora_scale: Tensor, scale: float) -> Tensor:
    """W + scale·(V·dora_scale / ‖V‖ - W) with V = W + rebuild, and the norm that of each column."""
    weight = (org_weight + rebuild).to(dora_scale.dtype)
    return org_weight + (weight / _norm(weight, 1) * dora_scale - org_weight) * scale


def _norm(weight: Tensor, axis: int) -> Tensor:
    """Of the weight at each place of an axis, in a shape that broadcasts over it."""
    return torch.linalg.vector_norm(weight, dim=[at for at in range(weight.dim()) if at != axis], keepdim=True)
