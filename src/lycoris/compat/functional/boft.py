"""BOFT as functions of tensors (oft_blocks, rescale); rescale is None where the norms of rows do not change."""

from __future__ import annotations

from torch import Tensor

from lycoris.algorithms import BOFT
from lycoris.algorithms.base import interpolate
from lycoris.compat.functional.layer import (
    build_geometry,
    compute_rotated,
    initialize_tensors,
    name_tensors,
    require_tensors,
)
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine
from lycoris.ops.factorization import butterfly_sizes


def weight_gen(
    org_weight: Tensor, max_block_size: int, boft_m: int = -1, rescale: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return new tensors for a layer's weight: (blocks, rescale), which change nothing yet.

    Shapes: blocks (m, n, b, b) with n·b = O, rescale (O, 1, ...) or None. There are as many butterfly stages m as the
    layer allows.

    Args:
        max_block_size: Largest block size b. -1: the number of outputs O.
        boft_m: -1, or that number of stages; raises `ConfigError` for another.
    """
    out = org_weight.shape[0]
    limit = out if max_block_size == -1 else max_block_size
    size = max((s for s in butterfly_sizes(out) if s <= limit), default=max(limit, 2))
    p = initialize_tensors(BOFT(block_size=size, rescale=rescale), org_weight)
    if boft_m not in (-1, len(p["blocks"])):
        raise ConfigError(
            f"boft_m must be -1 or {len(p['blocks'])}, the number of stages that connect all rows, not {boft_m}"
        )
    return p["blocks"], p.get("rescale")


def diff_weight(
    org_weight: Tensor,
    *weights: Tensor | None,
    constraint: float | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Return scale·(V - W), with V the rotated weight.

    Args:
        weights: (oft_blocks, rescale), as `weight_gen` returns them.
        constraint: Limit on the Frobenius norm of all blocks together. None or 0: no limit.
    """
    algorithm, p = _read_boft_tensors(weights, constraint)
    base = Affine(org_weight.to(p["blocks"].dtype), None)
    rotated = algorithm.transform(p, base, build_geometry(org_weight.shape))
    return interpolate(base, rotated, scale).weight - base.weight


def bypass_forward_diff(
    org_out: Tensor,
    *weights: Tensor | None,
    constraint: float | None = None,
    need_transpose: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Return what the rotation adds to a layer's output, times `scale`.

    `need_transpose`: channels are on axis 1, as after a convolution. Otherwise as `diff_weight`.
    """
    return compute_rotated(*_read_boft_tensors(weights, constraint), org_out, need_transpose, scale)


def _read_boft_tensors(weights: tuple[Tensor | None, ...], constraint: float | None) -> tuple[BOFT, dict[str, Tensor]]:
    p = name_tensors(weights, ("blocks", "rescale"))
    require_tensors(p, "blocks")
    size, rows = p["blocks"].shape[-1], p["blocks"].shape[-3] * p["blocks"].shape[-2]
    return BOFT(block_size=size, constraint=float(constraint or 0) / rows, rescale="rescale" in p), p
