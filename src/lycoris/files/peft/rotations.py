"""The rotation matrices of PEFT's OFT and BOFT, which act on a layer's inputs and so are not this library's `OFT` or
`BOFT`.

Legend: n rotated features, b features in a block, R the rotation (n, n); the weight becomes W·Rᵀ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lycoris.errors import FileError
from lycoris.files.peft.config import PeftConfig
from lycoris.ops.rotation import cayley


def make_oft_rotation(packed: Tensor, n: int, config: PeftConfig) -> Tensor:
    """Build R from PEFT's OFT parameters.

    Args:
        packed: Upper triangles (blocks, b·(b-1)/2), or a single one with `block_share`.
        n: Number of features.

    Raises:
        FileError: They do not form blocks of n features.
    """
    size = (1 + math.isqrt(1 + 8 * packed.shape[-1])) // 2
    shared = config.get_flag("block_share")
    blocks = n // size if shared else len(packed)
    if packed.dim() != 2 or size * (size - 1) // 2 != packed.shape[-1] or blocks * size != n:
        raise FileError(f"oft_R of shape {tuple(packed.shape)} makes no blocks for {n} features")
    skew = packed.new_zeros(len(packed), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = packed
    skew = skew - skew.mT
    if config.get_flag("coft"):
        skew = _limit_block_norms(skew, config.get_number("eps", 6e-5))
    if config.get_flag("use_cayley_neumann", True):
        rotations = _apply_neumann(skew, int(config.get_number("num_cayley_neumann_terms", 5)))
    else:
        rotations = _apply_cayley(skew)
    return _join_blocks(rotations.expand(blocks, -1, -1))


def make_boft_rotation(stages: Tensor) -> Tensor:
    """Build R from PEFT's BOFT parameters (stages, blocks, b, b).

    The blocks of each stage act on features that a butterfly permutation brings together. Raises `FileError` for other
    shapes.
    """
    if stages.dim() != 4 or stages.shape[2] != stages.shape[3]:
        raise FileError(f"boft_R of shape {tuple(stages.shape)} makes no stages of square blocks")
    count, blocks, size, _ = stages.shape
    rotations = _apply_cayley(0.5 * (stages - stages.mT))
    product = torch.eye(blocks * size, dtype=stages.dtype)
    for at, stage in enumerate(rotations):
        stage_rotation = _join_blocks(stage)
        if count > 1:
            order = _make_butterfly(blocks * size, size, at)
            stage_rotation = stage_rotation[order][:, order]
        product = stage_rotation @ product
    return product


def _make_butterfly(n: int, size: int, stage: int) -> Tensor:
    """Which feature each place of a stage takes: in each stretch of `size`·2^stage, even half blocks, then odd ones."""
    half = size // 2
    stretch = size << stage
    if n % stretch or size % 2:
        raise FileError(f"{n} features are no butterfly of blocks of {size} with {stage + 1} stages")
    pieces = torch.arange(stretch).reshape(-1, half)
    order = torch.cat([pieces[0::2], pieces[1::2]]).flatten()
    return (torch.arange(0, n, stretch).unsqueeze(1) + order).flatten()


def _join_blocks(blocks: Tensor) -> Tensor:
    """Along the diagonal of one matrix."""
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]  # torch has no types for it
    return matrix


def _apply_cayley(skew: Tensor) -> Tensor:
    """(I - Q)·(I + Q)⁻¹."""
    return torch.eye(skew.shape[-1], dtype=skew.dtype) + cayley(-skew / 2)


def _apply_neumann(skew: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + ..., the last of the powers once, as PEFT cuts the series of (I + Q)·(I - Q)⁻¹ short."""
    total = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
    if terms < 2:
        return total
    total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total


def _limit_block_norms(skew: Tensor, eps: float) -> Tensor:
    """Each block within a Frobenius norm of eps / √blocks."""
    bound = eps / math.sqrt(len(skew))
    norm = torch.linalg.matrix_norm(skew, keepdim=True)
    return torch.where(norm <= bound, skew, skew * (bound / norm))
