"""Orthogonal matrices of blocks: made from skew-symmetric ones, and applied to channels.

Legend: O channels in n blocks of s. A butterfly (BOFT) is a chain of stages: with channels numbered as
(e_p, ..., e_0, v), bits e and v below s/2, stage i mixes those that differ in v and e_i only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PASS = 48
"""What reading and writing a number costs, in multiplications: how far stages are worth joining."""


def cayley(blocks: Tensor, bound: float = 0.0) -> Tensor:
    """R - I for R = (I + Q)(I - Q)⁻¹, Q = B - Bᵀ; with a bound above 0, Q is scaled down to that Frobenius norm, taken
    over all blocks together.

    R - I = 2Q(I - Q)⁻¹: exactly zero for Q = 0, and a small rotation keeps its digits. Shapes: (..., s, s) → the same.
    Half precision is computed in float32.
    """
    q = blocks - blocks.mT
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    if bound > 0:
        q = q * (bound / (torch.linalg.vector_norm(q) + 1e-8)).clamp_max(1.0)
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # X(I - Q) = 2Q, solved from the left: (I - Q)ᵀ = I + Q.
    return torch.linalg.solve(eye + q, (2 * q).mT).mT


def turn_blocks(y: Tensor, turn: Tensor, axis: int = -1) -> Tensor:
    """y + y·turn in each block of channels. Shapes: y with n·s channels on `axis` from the end, turn (n, s, s)."""
    n, s, _ = turn.shape
    turn = turn.to(y.dtype)
    if not y.numel():
        return y
    if axis == -1:
        rows = y.reshape(-1, n, s).transpose(0, 1)
        return torch.baddbmm(rows, rows, turn).transpose(0, 1).reshape(y.shape).to(y.dtype)
    blocks = y.reshape(-1, n, s, math.prod(y.shape[axis + 1 :]))
    return (blocks + torch.matmul(turn.mT, blocks)).reshape(y.shape).to(y.dtype)


def scaled_turn(turn: Tensor, length: Tensor | None) -> Tensor:
    """R·diag(length) - I from R - I. Shapes: turn (n, s, s), length with n·s numbers in all, or None."""
    if length is None:
        return turn
    length = length.reshape(turn.shape[0], 1, turn.shape[-1]).to(turn.dtype)
    return turn * length + torch.diag_embed(length.squeeze(1) - 1)


def stage(rows: Tensor, turn: Tensor, i: int) -> Tensor:
    """Butterfly stage i on the first axis: rows + turn·rows in each group. Shapes: rows (O, N), turn (n, s, s)."""
    n, s, _ = turn.shape
    view = rows.reshape(n >> i, 2, 1 << i, s // 2, -1)
    groups = view.permute(0, 2, 3, 1, 4).reshape(n, s, -1)
    turned = torch.matmul(turn.to(rows.dtype), groups).reshape(n >> i, 1 << i, s // 2, 2, -1)
    return rows + turned.permute(0, 3, 1, 2, 4).reshape(rows.shape)


def joined(m: int, s: int) -> int:
    """How many neighbouring stages of m are best applied as one: larger blocks, fewer passes over the activations."""

    def cost(many: int) -> int:
        return sum((s // 2 << min(many, m - at)) + PASS for at in range(0, m, many))

    return min(range(1, m + 1), key=cost)


def butterfly_work(o: int, m: int, s: int) -> int:
    """Multiplications per token."""
    many = joined(m, s)
    return sum(o * (s // 2 << min(many, m - at)) for at in range(0, m, many))


def butterfly(y: Tensor, turns: Tensor, length: Tensor | None = None) -> Tensor:
    """All stages on the last axis, y·(R_m-1 ... R_0)ᵀ, then times `length`. Shapes: y (T, O), turns (m, n, s, s).

    Neighbouring stages are multiplied into one matrix of larger blocks first.
    """
    m, n, s, _ = turns.shape
    many = joined(m, s)
    for first in range(0, m, many):
        count = min(many, m - first)
        size, high, low = s // 2 << count, n * 2 >> (first + count), 1 << first
        # Row o of `whole` says what channel o takes from each channel of its block.
        eye = torch.eye(size, dtype=turns.dtype, device=turns.device)
        spread = eye.view(1, 1 << count, 1, s // 2, size).expand(high, -1, low, -1, -1)
        whole = spread.reshape(n * s, size)
        for at in range(first, first + count):
            whole = stage(whole, turns[at], at)
        whole = whole - spread.reshape(n * s, size)
        turn = whole.view(high, 1 << count, low, s // 2, size).permute(0, 2, 4, 1, 3).reshape(high * low, size, size)
        view = y.reshape(-1, high, 1 << count, low, s // 2)
        rows = view.permute(1, 3, 0, 2, 4).reshape(high * low, -1, size)
        if first + count == m and length is not None:
            order = length.reshape(high, 1 << count, low, s // 2).permute(0, 2, 1, 3)
            turn = scaled_turn(turn, order)
        rows = torch.baddbmm(rows, rows, turn.to(rows.dtype))
        back = rows.reshape(high, low, -1, 1 << count, s // 2).permute(2, 0, 3, 1, 4)
        y = back.reshape(y.shape).to(y.dtype)
    return y
