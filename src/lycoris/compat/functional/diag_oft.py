"""Diag-OFT as functions of tensors (oft_blocks, rescale); rescale is None where the norms of rows do not change."""

from __future__ import annotations

import torch
from torch import Tensor

from lycoris.algorithms import OFT
from lycoris.compat.functional.layer import (
    build_geometry,
    compute_rotated,
    factorization,
    initialize_tensors,
    name_tensors,
    require_tensors,
)
from lycoris.layers.geometry import Affine
from lycoris.ops.rotation import cayley


def weight_gen(org_weight: Tensor, max_block_size: int = -1, rescale: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return new tensors for a layer's weight: (blocks, rescale), which change nothing yet.

    Shapes: blocks (n, b, b) with n·b = O, rescale (O, 1, ...) or None. `max_block_size` limits b; -1 chooses it near
    √O.
    """
    size = factorization(org_weight.shape[0], max_block_size)[0]
    p = initialize_tensors(OFT(block_size=size, rescale=rescale), org_weight)
    return p["blocks"], p.get("rescale")


def diff_weight(
    org_weight: Tensor, *weights: Tensor | None, constraint: float | None = None, backend: str | None = None
) -> Tensor:
    """Return V - W, with V the rotated weight.

    Args:
        weights: (oft_blocks, rescale), as `weight_gen` returns them.
        constraint: Limit on the Frobenius norm of all blocks together. None or 0: no limit.
    """
    algorithm, p = _read_oft_tensors(weights, constraint)
    wide = org_weight.to(p["blocks"].dtype)
    return algorithm.transform(p, Affine(wide, None), build_geometry(wide.shape)).weight - wide


def bypass_forward_diff(
    x: Tensor,
    org_out: Tensor,
    *weights: Tensor | None,
    constraint: float | None = None,
    need_transpose: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return what the rotation adds to a layer's output `org_out`; `x` is not read.

    `need_transpose`: channels are on axis 1, as after a convolution. Otherwise as `diff_weight`.
    """
    return compute_rotated(*_read_oft_tensors(weights, constraint), org_out, need_transpose, 1.0)


def _read_oft_tensors(weights: tuple[Tensor | None, ...], constraint: float | None) -> tuple[OFT, dict[str, Tensor]]:
    p = name_tensors(weights, ("blocks", "rescale"))
    require_tensors(p, "blocks")
    size, rows = p["blocks"].shape[-1], p["blocks"].shape[-3] * p["blocks"].shape[-2]
    return OFT(block_size=size, constraint=float(constraint or 0) / rows, rescale="rescale" in p), p


def get_r(oft_blocks: Tensor, I: Tensor | None = None, constraint: float | None = 0) -> Tensor:  # noqa: E741  # its name in lycoris-lora
    """Return R = (I + Q)·(I - Q)⁻¹ with Q = B - Bᵀ for each block B, shape (..., b, b).

    Args:
        I: The identity of a block, which may be left out.
        constraint: Limit on the norm of Q over all blocks. None or 0: no limit.
    """
    eye = torch.eye(oft_blocks.shape[-1], device=oft_blocks.device) if I is None else I
    return cayley(oft_blocks, float(constraint or 0)) + eye
