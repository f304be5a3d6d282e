"""Scaling channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 64
"""Taken together when a product is summed over rows on a CPU: few enough to stay in its cache."""


def bend(y: Tensor, w: Tensor, axis: int = -1, bias: Tensor | None = None) -> Tensor:
    """y + w·(y - bias), with w and bias per channel, in the precision of y; exactly y where w is 0.

    Shapes: y with C channels on `axis`, which counts from the end; w (C); bias (C) or None.
    """
    small = y.numel() < ROWS * 4096 or y.device.type != "cpu"
    if axis != -1 or y.dtype != w.dtype or small or torch.compiler.is_compiling():
        return reference(y, w, axis, bias)
    shift = y.new_zeros(()) if bias is None else -bias.to(w.dtype) * w
    return _Bend.apply(y, w, shift)  # type: ignore[no-untyped-call]


def reference(y: Tensor, w: Tensor, axis: int = -1, bias: Tensor | None = None) -> Tensor:
    """Return what `bend` does by plain autograd, which defines it.

    Shapes are those of `bend`, which takes this path itself on a GPU, for small y, and under `torch.compile`.
    """
    shape = (-1, *(1,) * (-1 - axis))
    plain = y if bias is None else y - bias.to(y.dtype).reshape(shape)
    return torch.addcmul(y, plain, w.to(y.dtype).reshape(shape))


class _Bend(torch.autograd.Function):
    """One pass over y forward; the gradient of w sums rows without building their products for all of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(y, w)
        ctx.shifted = shift.dim() > 0
        return torch.addcmul(shift, y, 1 + w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        y, w = ctx.saved_tensors
        rows, seen = g.reshape(-1, g.shape[-1]), y.reshape(-1, y.shape[-1])
        gw = None
        if ctx.needs_input_grad[1]:
            gw = torch.zeros_like(w)
            for at in range(0, len(rows), ROWS):
                gw += (rows[at : at + ROWS] * seen[at : at + ROWS]).sum(0)
        gs = rows.sum(0) if ctx.shifted and ctx.needs_input_grad[2] else None
        return g * (1 + w) if ctx.needs_input_grad[0] else None, gw, gs
