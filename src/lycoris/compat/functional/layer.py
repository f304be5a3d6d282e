"""What the functions have in common: a layer known by its shape alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.call import Call
from lycoris.algorithms.layer_below import BareWeight
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.factorization import factorize


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of a number, the smaller first: as near to `factor` from below as divides it, -1: to the root."""
    small, large = factorize(dimension, factor)
    return small, large


def geometry(shape: Sequence[int], extra_args: Mapping[str, Any] | None = None) -> Geometry:
    """Of a layer with a weight of that shape; `extra_args` are those of `torch.nn.functional.conv2d`."""
    o, i, *kernel = shape
    if not kernel:
        return Geometry(kind="linear", shape=(o, i), has_bias=False)
    extra = dict(extra_args or {})

    def each(name: str, usual: int) -> tuple[int, ...]:
        value = extra.get(name, usual)
        return (value,) * len(kernel) if isinstance(value, int) else tuple(value)

    padding = extra.get("padding", 0)
    pad = () if isinstance(padding, str) else tuple(n for n in reversed(each("padding", 0)) for _ in range(2))
    return Geometry(
        kind="conv",
        shape=(o, i, *kernel),
        has_bias=False,
        stride=each("stride", 1),
        padding=padding if isinstance(padding, str) else each("padding", 0),
        dilation=each("dilation", 1),
        groups=extra.get("groups", 1),
        pad=pad,
    )


def name_tensors(weights: Sequence[Tensor | None], slots: Sequence[str]) -> dict[str, Tensor]:
    """Tensors by slot, in the order of functions. Raises `ConfigError` for more than there are slots."""
    if len(weights) > len(slots):
        raise ConfigError(f"the tensors are {', '.join(slots)}, in this order; {len(weights)} were given")
    return {name: tensor for name, tensor in zip(slots, weights, strict=False) if tensor is not None}


def require(p: Mapping[str, Tensor], *slots: str) -> None:
    """Raise `ConfigError` unless all of these were given."""
    if missing := [name for name in slots if name not in p]:
        raise ConfigError(f"{' and '.join(missing)} may not be None; given were {', '.join(p) or 'none'}")


def shape_tensors(algorithm: Algorithm, p: Mapping[str, Tensor], g: Geometry) -> dict[str, Tensor]:
    """Tensors in the shapes that the algorithm has them in. Raises `ConfigError` when they are not its own."""
    slots = algorithm.slots(g)
    if p.keys() != slots.keys():
        raise ConfigError(f"{algorithm.name} has the tensors {', '.join(slots)} here; given were {', '.join(p)}")
    return {name: tensor.reshape(slots[name].shape) for name, tensor in p.items()}


def start_tensors(algorithm: Algorithm, weight: Tensor) -> dict[str, Tensor]:
    """New tensors, float32 and on the CPU, that change nothing."""
    g = geometry(weight.shape)
    algorithm.check(g)
    tensors = {name: torch.empty(slot.shape) for name, slot in algorithm.slots(g).items()}
    algorithm.initialize(tensors, BareWeight(g, weight))
    return tensors


def compute_added(
    algorithm: Additive, p: Mapping[str, Tensor], g: Geometry, x: Tensor, org_out: Tensor | None
) -> Tensor:
    """What the algorithm adds to a layer's output; `org_out` is only asked for its shape."""
    if org_out is None:
        return g.op(x, algorithm.delta(p, g).weight * algorithm.scale(g))
    return algorithm.add(torch.zeros_like(org_out), p, g, x, Call())


Read = Callable[
    [tuple[Tensor | None, ...], float, Mapping[str, Any] | None], tuple[Additive, dict[str, Tensor], Geometry]
]
"""Tensors as a function takes them, gamma and a convolution's arguments → an algorithm, its tensors, a layer."""


@dataclass(frozen=True)
class Added:
    """The functions of an algorithm that adds something to the weight; a module has these methods as its own."""

    read: Read

    def diff_weight(self, *weights: Tensor | None, gamma: float = 1.0, backend: str | None = None) -> Tensor:
        """gamma·ΔW. For LoKr gamma is alpha: divided by the rank, and without effect where both factors are whole."""
        algorithm, p, g = self.read(weights, gamma, {})
        return algorithm.delta(p, g).weight * algorithm.scale(g)

    def bypass_forward_diff(
        self,
        x: Tensor,
        org_out: Tensor | None,
        *weights: Tensor | None,
        gamma: float = 1.0,
        extra_args: Mapping[str, Any] | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """The same applied to x."""
        return compute_added(*self.read(weights, gamma, extra_args), x, org_out)


class Output:
    """A layer that has run: what lies below an algorithm that changes outputs."""

    def __init__(self, y: Tensor, channels_first: bool) -> None:
        channels = y.shape[1] if channels_first else y.shape[-1]
        spatial = (1,) * (y.dim() - 2) if channels_first else ()
        self.geometry, self.y = geometry((channels, channels, *spatial)), y

    def __call__(self, x: Tensor) -> Tensor:
        return self.y

    def affine(self) -> Affine:
        raise TypeError("only the output of this layer is known")

    def bias(self) -> Tensor | None:
        return None

    def plain(self, x: Tensor) -> Affine | None:
        return None

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        raise TypeError("only the output of this layer is known")


def compute_rotated(
    algorithm: Algorithm, p: Mapping[str, Tensor], y: Tensor, channels_first: bool, scale: float
) -> Tensor:
    """What an algorithm that changes outputs adds to one."""
    return algorithm.forward(p, Output(y, channels_first), y, Call(scale)) - y
