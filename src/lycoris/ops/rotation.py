"""Orthogonal matrices of blocks: made from skew-symmetric ones, and applied to channels.

Legend: O channels in n blocks of s. A butterfly (BOFT) is a chain of stages: with channels numbered as
(e_p, ..., e_0, v), bits e and v below s/2, stage i mixes those that differ in v and e_i only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lycoris.ops.rounding import widen
from lycoris.ops.shape import unflatten

ROTATION_CHUNK = 256
"""Tokens taken together on a CPU."""

PASS = 48
"""What reading and writing a number costs, in multiplications: how far stages are worth joining."""


def cayley(blocks: Tensor, bound: float = 0.0) -> Tensor:
    """R - I for R = (I + Q)(I - Q)⁻¹, Q = B - Bᵀ; with a bound above 0, Q is scaled down to that Frobenius norm, taken
    over all blocks together.

    R - I = 2Q(I - Q)⁻¹: exactly zero for Q = 0, and a small rotation keeps its digits. Shapes: (..., s, s) → the same.
    Half precision is computed in float32.
    """
    q = limit_norm(widen(blocks), bound)
    q = q - q.mT
    return _rotate(q) if torch.compiler.is_compiling() else _Cayley.apply(q)  # type: ignore[no-untyped-call]  # torch has no types for it


def limit_norm(blocks: Tensor, bound: float) -> Tensor:
    """Return B scaled down so that Q = B - Bᵀ of all blocks together is within a Frobenius norm.

    With a bound of 0 or less it is B itself, else in at least float32; a B within the bound keeps its values.
    Shapes: (..., s, s) → the same.
    """
    if bound <= 0:
        return blocks
    blocks = widen(blocks)
    norm = torch.linalg.vector_norm(blocks - blocks.mT)
    return blocks * (bound / (norm + 1e-8)).clamp_max(1.0)


def _rotate(q: Tensor) -> Tensor:
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # X(I - Q) = 2Q, solved from the left: (I - Q)ᵀ = I + Q.
    return torch.linalg.solve(eye + q, (2 * q).mT).mT.contiguous()


class _Cayley(torch.autograd.Function):
    """With D = R - I, (I - Q)⁻¹ is (D + 2I)/2, so dD = (D + 2I)·dQ·(D + 2I)/2: backward solves nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor) -> Tensor:
        return _rotate(q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (turn,) = ctx.saved_tensors
        twice = (turn + 2 * torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)).mT
        return twice @ grads[0] @ twice / 2


def turn_blocks(y: Tensor, turn: Tensor, axis: int = -1, shift: Tensor | None = None) -> Tensor:
    """y + y·turn in each block of channels, and `shift` per channel. Shapes: y with n·s channels on `axis` from the
    end, turn (n, s, s), shift (n·s) or None.
    """
    n, s, _ = turn.shape
    turn = turn.to(y.dtype)
    if not y.numel():
        return y
    if axis != -1:
        blocks = y.reshape(-1, n, s, math.prod(y.shape[axis + 1 :]))
        added = torch.matmul(turn.mT, blocks).reshape(y.shape).to(y.dtype)
        return y + added if shift is None else y + added + shift.reshape(-1, *(1,) * (-1 - axis))
    wide = y.dtype in (torch.float32, torch.float64) and y.device.type == "cpu"
    if wide and not torch.compiler.is_compiling():
        return _TurnBlocks.apply(y, turn, torch.zeros((), dtype=y.dtype) if shift is None else shift)  # type: ignore[no-untyped-call]
    rows = y.reshape(-1, n, s).transpose(0, 1)
    turned = unflatten(torch.baddbmm(rows, rows, turn).transpose(0, 1).contiguous(), y.shape).to(y.dtype)
    return turned if shift is None else turned + shift


class _TurnBlocks(torch.autograd.Function):
    """The same, some tokens at a time, so that what lies between stays in the cache."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
        n, s, _ = turn.shape
        ctx.save_for_backward(y, turn)
        ctx.shifted = shift.dim() > 0
        out, whole = torch.empty(y.shape, dtype=y.dtype), _with_eye(turn)
        shift = shift.view(n, s) if ctx.shifted else shift
        for rows, to in zip(_chunks(y, n, s), _chunks(out, n, s), strict=True):
            torch.add(torch.bmm(rows.transpose(0, 1), whole).transpose(0, 1), shift, out=to)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g = grads[0].contiguous()
        y, turn = ctx.saved_tensors
        n, s, _ = turn.shape
        back = _with_eye(turn).mT
        gy, gt = torch.empty(y.shape, dtype=y.dtype), torch.zeros_like(turn)
        for rows, seen, to in zip(_chunks(g, n, s), _chunks(y, n, s), _chunks(gy, n, s), strict=True):
            to.copy_(torch.bmm(rows.transpose(0, 1), back).transpose(0, 1))
            gt.baddbmm_(seen.permute(1, 2, 0), rows.transpose(0, 1))
        return gy, gt, g.reshape(-1, n * s).sum(0) if ctx.shifted else None


def _chunks(y: Tensor, n: int, s: int) -> Sequence[Tensor]:
    return torch.split(y.reshape(-1, n, s), ROTATION_CHUNK)


def _with_eye(turn: Tensor) -> Tensor:
    return turn + torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)


def scaled_turn(turn: Tensor, length: Tensor | None) -> Tensor:
    """Return R·diag(length) - I from R - I, so that a rotation also scales the channels that it gives.

    None for `length` returns R - I itself. Shapes: turn (n, s, s), length with n·s numbers in all, or None.
    """
    if length is None:
        return turn
    length = length.reshape(turn.shape[0], 1, turn.shape[-1]).to(turn.dtype)
    return turn * length + torch.diag_embed(length.squeeze(1) - 1)


def stage(rows: Tensor, turn: Tensor, i: int) -> Tensor:
    """Return butterfly stage i on the first axis: rows + turn·rows in each group.

    Stage 0 mixes consecutive blocks of s. Shapes: rows (O, N), turn (n, s, s) = R_i - I with O = n·s → (O, N).
    """
    n, s, _ = turn.shape
    view = rows.reshape(n >> i, 2, 1 << i, s // 2, -1)
    groups = view.permute(0, 2, 3, 1, 4).reshape(n, s, -1)
    turned = torch.matmul(turn.to(rows.dtype), groups).reshape(n >> i, 1 << i, s // 2, 2, -1)
    return rows + turned.permute(0, 3, 1, 2, 4).reshape(rows.shape)


def stages_to_join(m: int, s: int) -> int:
    """Return how many neighboring stages of m are best applied as one, for fewer passes over the activations.

    The number from 1 to m with the least work per channel, where a pass counts as `PASS` multiplications.

    Args:
        m: stages of the butterfly.
        s: channels in a block of one stage; joining k of them makes blocks of s/2·2^k.
    """

    def cost(many: int) -> int:
        return sum((s // 2 << min(many, m - at)) + PASS for at in range(0, m, many))

    return min(range(1, m + 1), key=cost)


def butterfly_work(o: int, m: int, s: int) -> int:
    """Return the multiplications per token of a butterfly whose stages are joined as `stages_to_join` says.

    Args:
        o: channels.
        m: stages.
        s: channels in a block of one stage.
    """
    many = stages_to_join(m, s)
    return sum(o * (s // 2 << min(many, m - at)) for at in range(0, m, many))


class Butterfly(NamedTuple):
    """Stages of a butterfly, neighbors multiplied into one matrix of larger blocks: fewer passes over activations."""

    turns: list[Tensor]
    """(blocks, size, size) each, for channels on the right, minus I."""
    orders: list[list[int]]
    """Axes of (T, e_p, ..., e_0, v) that bring the channels of each block together."""


def joined_butterfly(stages: Tensor, length: Tensor | None = None) -> Butterfly:
    """Return the stages R_m-1 ... R_0 as one butterfly, with output channels multiplied by `length` where it is given.

    Shapes: stages (m, n, s, s), each R_i - I; length with n·s numbers, or None. Differentiable in both.
    """
    m, s = stages.shape[0], stages.shape[-1]
    many = stages_to_join(m, s)
    turns, orders = [], []
    for first in range(0, m, many):
        count = min(many, m - first)
        bits = list(range(1, m + 1))
        mid = bits[m - first - count : m - first]
        orders.append([*(bit for bit in bits if bit not in mid), 0, *mid, m + 1])
        turns.append(_join_stages(stages[first : first + count], first))
    if length is not None:
        numbered = length.reshape(1, *(2,) * m, s // 2)
        turns[-1] = scaled_turn(turns[-1], numbered.permute(orders[-1]).reshape(len(turns[-1]), -1))
    return Butterfly(turns, orders)


def turn_all(y: Tensor, butterfly: Butterfly, shift: Tensor | None = None) -> Tensor:
    """Return y·(R_m-1 ... R_0)ᵀ, plus `shift` per channel.

    Computed in the dtype of y. On a CPU, float32 and float64 inputs of the matrices but the first are computed again in
    backward and not kept. Shapes: y (T, O), shift (O) or None → (T, O).
    """
    turns = [turn.to(y.dtype) for turn in butterfly.turns]
    wide = y.dtype in (torch.float32, torch.float64) and y.device.type == "cpu"
    if wide and not torch.compiler.is_compiling():
        return _Butterfly.apply(y, shift, butterfly.orders, *turns)  # type: ignore[no-untyped-call]
    turned = _pass(y, turns, butterfly.orders)
    return turned if shift is None else turned + shift


def _pass(y: Tensor, whole: Sequence[Tensor], orders: Sequence[Sequence[int]]) -> Tensor:
    """Each matrix in turn. Shapes: y (T, O); matrices (blocks, size, size), minus I."""
    view = y.reshape(-1, *(2,) * (len(orders[0]) - 2), y.shape[-1] >> (len(orders[0]) - 2))
    # (T, e_p, ..., e_0, v): what lies between two matrices is a permutation, and one copy.
    for turn, order in zip(whole, orders, strict=True):
        view = _ungroup_blocks(_rotate_rows(_group_blocks(view, turn, order), turn), view, order)
    return view.reshape(y.shape)


def _group_blocks(view: Tensor, turn: Tensor, order: Sequence[int]) -> Tensor:
    """(T, e_p, ..., e_0, v) → (blocks, T, size)."""
    return view.permute(*order).reshape(len(turn), -1, turn.shape[-1])


def _ungroup_blocks(rows: Tensor, view: Tensor, order: Sequence[int]) -> Tensor:
    """And back."""
    return rows.reshape([view.shape[at] for at in order]).permute([order.index(at) for at in range(len(order))])


def _rotate_rows(rows: Tensor, turn: Tensor) -> Tensor:
    """rows + rows·turn. Low precision must not round I + turn."""
    if rows.dtype in (torch.float32, torch.float64):
        return torch.bmm(rows, _with_eye(turn)).to(rows.dtype)
    return torch.baddbmm(rows, rows, turn).to(rows.dtype)


class _Butterfly(torch.autograd.Function):
    """The same, some tokens at a time; keeps the first input and finds those of later matrices again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shift: Tensor | None, orders: Sequence[Sequence[int]], *whole: Tensor) -> Tensor:
        ctx.orders = orders
        ctx.save_for_backward(y, *whole)
        out = torch.empty(y.shape, dtype=y.dtype)
        for rows, to in zip(torch.split(y, ROTATION_CHUNK), torch.split(out, ROTATION_CHUNK), strict=True):
            turned = _pass(rows, whole, orders)
            to.copy_(turned) if shift is None else torch.add(turned, shift, out=to)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, *whole = ctx.saved_tensors
        orders = ctx.orders
        gy, gw = torch.empty(y.shape, dtype=y.dtype), [torch.zeros_like(turn) for turn in whole]
        back = [_with_eye(turn).mT for turn in whole]
        shape = (-1, *(2,) * (len(orders[0]) - 2), y.shape[-1] >> (len(orders[0]) - 2))
        for g, rows, to in zip(*(torch.split(t, ROTATION_CHUNK) for t in (grads[0], y, gy)), strict=True):
            view, grad, seen = rows.reshape(shape), g.reshape(shape), []
            for turn, order in zip(whole, orders, strict=True):
                seen.append(_group_blocks(view, turn, order))
                if len(seen) < len(whole):
                    view = _ungroup_blocks(_rotate_rows(seen[-1], turn), view, order)
            for at in range(len(whole) - 1, -1, -1):
                right = _group_blocks(grad, whole[at], orders[at])
                gw[at].baddbmm_(seen[at].mT, right)
                grad = _ungroup_blocks(torch.bmm(right, back[at]), grad, orders[at])
            to.copy_(grad.reshape(to.shape))
        return gy, grads[0].sum(0) if ctx.needs_input_grad[1] else None, None, *gw


def _join_stages(turns: Tensor, first: int) -> Tensor:
    """Some stages, the lowest of which is `first`, as one: (blocks, size, size), for channels on the right, minus I."""
    count, n, s, _ = turns.shape
    size, high, low = s // 2 << count, n * 2 >> (first + count), 1 << first
    # Row o of `whole` says what channel o takes from each channel of its block.
    eye = torch.eye(size, dtype=turns.dtype, device=turns.device)
    spread = eye.view(1, 1 << count, 1, s // 2, size).expand(high, -1, low, -1, -1).reshape(n * s, size)
    whole = spread
    for at in range(count):
        whole = stage(whole, turns[at], first + at)
    whole = (whole - spread).view(high, 1 << count, low, s // 2, size)
    return whole.permute(0, 2, 4, 1, 3).reshape(high * low, size, size)
