"""Singular value decompositions of products of thin factors and of dense matrices, and what a truncation leaves out.

Legend: A (O, I) a matrix, r' the columns of a factor, n the singular values that are computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 10
"""Directions more than are wanted that a randomized decomposition looks at; 5 to 10 (Halko et al., section 4.2)."""
ITERATIONS = 2
"""Power iterations of a randomized decomposition."""


class Decomposition(NamedTuple):
    """A ≈ left · diag(values) · right, the largest singular values first.

    Exact where `rest` is 0. Make it with `decompose` or `decompose_product`.
    """

    left: Tensor
    """(O, n)"""
    values: Tensor
    """(n)"""
    right: Tensor
    """(n, I)"""
    rest: float = 0.0
    """‖A‖² without these values, in the Frobenius norm; 0 where all of them are there."""

    def energies(self) -> Tensor:
        """Return ‖A - A_k‖² for k = 0 ... n, where A_k keeps the first k singular values.

        Entry k of the (n + 1) is the squared Frobenius error of rank k, in float64: from ‖A‖² down to `rest`.
        """
        squares = self.values.double().square()
        return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + self.rest

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return up (O, rank) and down (rank, I) of the best approximation of that rank, up · down.

        Both are multiplied by the root of the singular values. A rank above n gives n.
        """
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


def decompose_product(up: Tensor, down: Tensor) -> Decomposition:
    """A = up · down, exactly, of up (O, r') and down (r', I): QR of both factors and an SVD of the (r', r') core.

    Costs O((O + I)·r'² + r'³) and never builds A, unless the factors are no thinner than it.
    """
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return decompose(up @ down)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return Decomposition(q_up @ left, values, right @ q_down.mT)


def decompose(matrix: Tensor, rank: int | None = None, generator: torch.Generator | None = None) -> Decomposition:
    """A itself, or of its singular values the first `rank`, by a randomized range finder, which is much faster.

    The range is found from rank + `OVERSAMPLING` random directions and `ITERATIONS` power iterations with QR between
    them (arXiv:0909.4061, algorithms 4.4 and 5.1). What `rest` says of the error is exact either way.
    """
    small = min(matrix.shape)
    wanted = small if rank is None else min(2 * rank + OVERSAMPLING, small)
    if wanted >= small:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        start = torch.randn(matrix.shape[1], wanted, dtype=matrix.dtype, generator=generator).to(matrix.device)
        basis, _ = torch.linalg.qr(matrix @ start)
        for _ in range(ITERATIONS):
            other, _ = torch.linalg.qr(matrix.mT @ basis)
            basis, _ = torch.linalg.qr(matrix @ other)
        inner, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        left = basis @ inner
    kept = small if rank is None else rank
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64).square())
    rest = 0.0 if kept >= small else max(total - float(values[:kept].double().square().sum()), 0.0)
    return Decomposition(left[:, :kept], values[:kept], right[:kept], rest)


def relative(squared_error: float, squared_norm: float) -> float:
    """Return ‖error‖ / ‖A‖ from their squares.

    It is 0 where ‖A‖ is 0.
    """
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
