"""What the functions have in common: a layer described by the shape of its weight."""

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
    """Split a number into two factors, the smaller one first.

    A `factor` that divides the number is one of the two. Otherwise the smaller one is the largest divisor up to
    `factor` and the square root; -1 sets no limit but the latter.
    """
    small, large = factorize(dimension, factor)
    return small, large


def build_geometry(shape: Sequence[int], extra_args: Mapping[str, Any] | None = None) -> Geometry:
    """Return the geometry of a layer without a bias, whose weight has this shape.

    (O, I) is a linear layer, (O, I, *K) a convolution; `extra_args` are those of `torch.nn.functional.conv2d`, such as
    `padding`.
    """
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
    """Return the given tensors by slot; None is left out.

    Raises `ConfigError` for more tensors than slots.
    """
    if len(weights) > len(slots):
        raise ConfigError(f"expected at most {len(slots)} tensors ({', '.join(slots)}); {len(weights)} were given")
    return {name: tensor for name, tensor in zip(slots, weights, strict=False) if tensor is not None}


def require_tensors(p: Mapping[str, Tensor], *slots: str) -> None:
    """Raise `ConfigError` unless all of these slots were given."""
    if missing := [name for name in slots if name not in p]:
        raise ConfigError(f"{' and '.join(missing)} must be given; given were {', '.join(p) or 'none'}")


def shape_tensors(algorithm: Algorithm, p: Mapping[str, Tensor], g: Geometry) -> dict[str, Tensor]:
    """Reshape tensors to the shapes of the algorithm's slots.

    Raises `ConfigError` when the slots are not those that the algorithm has on this layer.
    """
    slots = algorithm.slots(g)
    if p.keys() != slots.keys():
        raise ConfigError(f"{algorithm.name} needs the tensors {', '.join(slots)} here; given were {', '.join(p)}")
    return {name: tensor.reshape(slots[name].shape) for name, tensor in p.items()}


def initialize_tensors(algorithm: Algorithm, weight: Tensor) -> dict[str, Tensor]:
    """Return new tensors for a weight, float32 and on the CPU, which change nothing yet.

    Raises `ConfigError` when the algorithm cannot adapt such a layer.
    """
    g = build_geometry(weight.shape)
    algorithm.check(g)
    tensors = {name: torch.empty(slot.shape) for name, slot in algorithm.slots(g).items()}
    algorithm.initialize(tensors, BareWeight(g, weight))
    return tensors


def compute_added(
    algorithm: Additive, p: Mapping[str, Tensor], g: Geometry, x: Tensor, org_out: Tensor | None
) -> Tensor:
    """Return what the algorithm adds to a layer's output.

    Of `org_out` only shape, dtype and device are read. None computes the layer with ΔW as its weight.
    """
    if org_out is None:
        return g.op(x, algorithm.delta(p, g).weight * algorithm.scale(g))
    return algorithm.add(torch.zeros_like(org_out), p, g, x, Call())


TensorReader = Callable[
    [tuple[Tensor | None, ...], float, Mapping[str, Any] | None], tuple[Additive, dict[str, Tensor], Geometry]
]
"""A function's tensors, gamma and convolution arguments → the algorithm, its tensors by slot, and the layer."""


@dataclass(frozen=True)
class AdditiveFunctions:
    """The functions of an algorithm with ΔW.

    A module has the methods of an instance as its own functions. `read` turns their arguments into the algorithm's.
    """

    read: TensorReader

    def diff_weight(self, *weights: Tensor | None, gamma: float = 1.0, backend: str | None = None) -> Tensor:
        """Return gamma·ΔW.

        For LoKr gamma is alpha: it is divided by the rank, and has no effect where both factors are full matrices.
        Raises `ConfigError` for missing tensors.
        """
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
        """Return gamma·ΔW applied to x.

        Args:
            org_out: Output of the layer, of which only shape, dtype and device are read. None: they follow from x.
            extra_args: Arguments of a convolution, such as `stride` and `padding`.
        """
        return compute_added(*self.read(weights, gamma, extra_args), x, org_out)


class _FixedOutputLayer:
    """A layer that has already run: the input of an algorithm that transforms outputs."""

    def __init__(self, y: Tensor, channels_first: bool) -> None:
        channels = y.shape[1] if channels_first else y.shape[-1]
        spatial = (1,) * (y.dim() - 2) if channels_first else ()
        self.geometry, self.y = build_geometry((channels, channels, *spatial)), y

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
    """Return what an algorithm that transforms outputs adds to the output `y`, at strength `scale`.

    `channels_first`: channels are on axis 1, otherwise on the last axis.
    """
    return algorithm.forward(p, _FixedOutputLayer(y, channels_first), y, Call(scale)) - y
