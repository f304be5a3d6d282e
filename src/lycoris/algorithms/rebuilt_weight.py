"""Apply a weight that is built from small tensors, and build it again in backward instead of saving it.

`apply_by_autograd` is the same function by plain autograd, which saves every intermediate of the size of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lycoris.layers.geometry import Geometry

Build = Callable[..., Tensor]
"""Maps small tensors to ΔW, in any floating-point dtype."""


def apply_rebuilt(
    build: Build, g: Geometry, x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: Sequence[Tensor]
) -> Tensor:
    """Return op(x, W + build(*factors), b), computed in the dtype of `x`.

    Saves `x`, W and the factors for backward, and nothing else.

    Args:
        build: gives ΔW (O, I, *K) from the factors.
        weight: W (O, I, *K); None: zero.
        bias: (O), or None.
    """
    trained = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
    if torch.compiler.is_compiling() or not trained or g.kind not in ("linear", "conv"):
        return apply_by_autograd(build, g, x, weight, bias, factors)
    if g.kind == "linear":
        return _Rebuilt.apply(build, g, x, weight, bias, *factors)  # type: ignore[no-untyped-call]
    batched = x.dim() == len(g.kernel) + 2
    x = x if batched else x.unsqueeze(0)
    if g.even_padding is None:
        none = (0,) * len(g.kernel)
        x, g = g.pad_input(x), replace(g, padding=none, pad=none * 2, padding_mode="zeros")
    y = _Rebuilt.apply(build, g, x, weight, bias, *factors)  # type: ignore[no-untyped-call]
    return y if batched else y.squeeze(0)


def apply_by_autograd(
    build: Build, g: Geometry, x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: Sequence[Tensor]
) -> Tensor:
    """Return the result of `apply_rebuilt` by plain autograd.

    It keeps the built weight for backward. Arguments are those of `apply_rebuilt`.
    """
    return g.op(x, _add_weight(build(*factors), weight, x if x.is_floating_point() else None), bias)


def _add_weight(change: Tensor, weight: Tensor | None, like: Tensor | None) -> Tensor:
    change = change if like is None else change.to(like.dtype)
    return change if weight is None else weight + change


class _Rebuilt(torch.autograd.Function):
    """`apply_rebuilt` on a linear layer, or on a convolution with even zero padding."""

    @staticmethod
    def forward(
        ctx: Any, build: Build, g: Geometry, x: Tensor, weight: Tensor | None, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        ctx.build, ctx.g, ctx.has_weight = build, g, weight is not None
        ctx.save_for_backward(x, *((weight,) if weight is not None else ()), *factors)
        with torch.autocast(x.device.type, enabled=False):
            change = build(*factors).to(x.dtype)
            whole = change if weight is None else change.add_(weight)
            # torch picks kernels, and with them the last bit, by what has a gradient: where ΔW is zero, the result
            # must be the layer's own.
            with torch.enable_grad():
                whole = whole.detach().requires_grad_(weight is not None and weight.requires_grad)
                return g.op(x.detach().requires_grad_(x.requires_grad), whole, bias).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gy,) = grads
        x, *rest = ctx.saved_tensors
        weight = rest.pop(0) if ctx.has_weight else None
        needs = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                factors = [t.detach().requires_grad_(need) for t, need in zip(rest, needs[5:], strict=True)]
                change = ctx.build(*factors)
            gx, gv = _layer_gradients(ctx.g, gy, x, _add_weight(change.detach(), weight, x), needs[2])
            wanted = [factor for factor in factors if factor.requires_grad]
            # A bias's delta, say, is no part of the weight.
            found = iter(torch.autograd.grad(change, wanted, gv.to(change.dtype), allow_unused=True))
        gb = None
        if needs[4]:
            rows = gy.reshape(-1, gy.shape[-1]) if ctx.g.kind == "linear" else gy.transpose(0, 1).flatten(1).T
            gb = rows.sum(0)
        own = (next(found) if factor.requires_grad else None for factor in factors)
        return None, None, gx, gv if needs[3] else None, gb, *own


def _layer_gradients(g: Geometry, gy: Tensor, x: Tensor, whole: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor]:
    if g.kind == "linear":
        rows, seen = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
        return (rows @ whole).view(x.shape) if need_x else None, rows.T @ seen
    none = [0] * len(g.kernel)
    gx, gv, _ = torch.ops.aten.convolution_backward(
        gy, x, whole, None, g.stride, g.even_padding, g.dilation, False, none, g.groups, [need_x, True, False]
    )
    return gx, gv
