"""Layers whose forward has no derivative, as kernels made for inference have none.

What lies before such a layer would get a gradient without the layer's part: wrong, and not missing, for the adapter on
the layer passes its own. Where the layer's weight can be read, ∂L/∂x = ∂L/∂y·W stands in, with W decoded in backward.
Elsewhere backward raises, as soon as a parameter that trains lies before the layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lycoris.errors import AttachError
from lycoris.layers import base_weights
from lycoris.layers.geometry import Geometry

LAYER_NAMES_SHOWN = 5


@torch.compiler.disable  # type: ignore[untyped-decorator]
def supply(layer: nn.Module, path: str, geometry: Geometry, x: Tensor, y: Tensor) -> Tensor:
    """Return the output of a layer without a derivative, with one, or with an error in wait for a backward that asks.

    In backward the weight is decoded where it can stand in. Elsewhere backward raises `AttachError` if a parameter that
    trains lies before the layer, and warns if only other tensors that need a gradient do.

    Args:
        path: the layer's path, for messages; "" where it has none.
        x: the layer's input.
        y: the layer's output for it, whose values are returned unchanged.
    """
    # Tensors of inference mode cannot be kept for backward.
    return _Supplied.apply(x, y.clone() if y.is_inference() else y, layer, path, geometry)  # type: ignore[no-untyped-call]


class _Supplied(torch.autograd.Function):
    """The output itself, as a function of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, layer: nn.Module, path: str, geometry: Geometry) -> Tensor:
        ctx.layer, ctx.path, ctx.geometry = layer, path, geometry
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gy,) = grads
        nothing = (None,) * 4
        if not base_weights.stands_in(ctx.layer, ctx.geometry):
            _check_unneeded(ctx)
            return None, *nothing
        weight = ctx.geometry.transpose_stored(base_weights.read(ctx.layer).weight).to(gy.dtype)
        with torch.autocast(gy.device.type, enabled=False):
            return _input_gradient(ctx.geometry, gy, weight, ctx.shape).to(ctx.dtype), *nothing


def _input_gradient(g: Geometry, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    if g.kind == "linear":
        return gy @ weight
    with torch.enable_grad():
        x = torch.zeros(shape, dtype=gy.dtype, device=gy.device, requires_grad=True)
        return torch.autograd.grad(g.op(x, weight), x, gy)[0]


def _check_unneeded(node: Any) -> None:
    """Raise `AttachError` where a parameter before a layer needs the derivative that it lacks; warn of tensors."""
    before, layers = [], [_name(node)]
    for other in _nodes_before(node):
        if isinstance(leaf := getattr(other, "variable", None), Tensor):
            before.append(leaf)
        elif hasattr(other, "geometry") and hasattr(other, "path") and other is not node:
            layers.append(_name(other))
    some = ", ".join(layers[:LAYER_NAMES_SHOWN]) + (
        f" and {len(layers) - LAYER_NAMES_SHOWN} more" if len(layers) > LAYER_NAMES_SHOWN else ""
    )
    message = f"{some}: the forward of such a layer has no derivative, and its weight cannot stand in for one"
    if any(isinstance(leaf, nn.Parameter) for leaf in before):
        raise AttachError(
            f"{message}. Gradients of what trains before it would be wrong. Put adapters only behind such layers and "
            "freeze the rest, or load the base in a form that can be trained beside: docs/quantized.md has a table"
        )
    if before:
        warnings.warn(f"{message}. Gradients of tensors before it are without its part", stacklevel=2)


def _name(node: Any) -> str:
    return f"{node.path or 'the layer'} ({type(node.layer).__name__}, {base_weights.kind(node.layer)})"


def _nodes_before(node: Any) -> Iterator[Any]:
    """Every node of the graph that lies before one, that one first."""
    found, waiting = {node}, [node]
    while waiting:
        now = waiting.pop()
        yield now
        new = {before for before, _ in now.next_functions if before is not None} - found
        found |= new
        waiting += new
