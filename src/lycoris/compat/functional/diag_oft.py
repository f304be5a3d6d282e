"""Diag-OFT as functions of tensors: (oft_blocks, rescale), rescale None where rows keep their lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from lycoris.algorithms import OFT
from lycoris.compat.functional.layer import (
    compute_rotated,
    factorization,
    geometry,
    name_tensors,
    require,
    start_tensors,
)
from lycoris.layers.geometry import Affine
from lycoris.ops.rotation import cayley


def weight_gen(org_weight: Tensor, max_block_size: int = -1, rescale: bool = False) -> tuple[Tensor, Tensor | None]:
    """New tensors for a layer's weight."""
    size = factorization(org_weight.shape[0], max_block_size)[0]
    p = start_tensors(OFT(block_size=size, rescale=rescale), org_weight)
    return p["blocks"], p.get("rescale")


def diff_weight(
    org_weight: Tensor, *weights: Tensor | None, constraint: float | None = None, backend: str | None = None
) -> Tensor:
    """V - W. `constraint` limits the norm of all blocks together; None or 0: no limit."""
    algorithm, p = _read(weights, constraint)
    wide = org_weight.to(p["blocks"].dtype)
    return algorithm.transform(p, Affine(wide, None), geometry(wide.shape)).weight - wide


def bypass_forward_diff(
    x: Tensor,
    org_out: Tensor,
    *weights: Tensor | None,
    constraint: float | None = None,
    need_transpose: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The same on the layer's output. `need_transpose`: channels are on axis 1, as after a convolution."""
    return compute_rotated(*_read(weights, constraint), org_out, need_transpose, 1.0)


def _read(weights: tuple[Tensor | None, ...], constraint: float | None) -> tuple[OFT, dict[str, Tensor]]:
    p = name_tensors(weights, ("blocks", "rescale"))
    require(p, "blocks")
    size, rows = p["blocks"].shape[-1], p["blocks"].shape[-3] * p["blocks"].shape[-2]
    return OFT(block_size=size, constraint=float(constraint or 0) / rows, rescale="rescale" in p), p


def get_r(oft_blocks: Tensor, I: Tensor | None = None, constraint: float | None = 0) -> Tensor:  # noqa: E741  # its name in lycoris-lora
    """R = (I + Q)·(I - Q)⁻¹ for Q = B - Bᵀ of each block, kept within a norm over all blocks; None or 0: no limit.

    `I` is the identity, and may be left out.
    """
    eye = torch.eye(oft_blocks.shape[-1], device=oft_blocks.device) if I is None else I
    return cayley(oft_blocks, float(constraint or 0)) + eye
