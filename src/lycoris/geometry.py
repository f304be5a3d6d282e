"""What a layer is to an adapter: its kind, its shapes, and its operation as a function of weight and bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Kind = Literal["linear", "conv"]

_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shapes and operation of one layer. Tensors only; holds no weights.

    Legend: O out features or channels, I in features or channels *per group*, K kernel dimensions.
    """

    kind: Kind
    shape: tuple[int, ...]
    """Of the weight: (O, I) or (O, I, *K)."""
    has_bias: bool = True
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    pad: tuple[int, ...] = ()
    """`F.pad` amounts for padding modes other than zeros, last dimension first."""

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Per group."""
        return self.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel dimensions; empty for linear layers."""
        return self.shape[2:]

    @property
    def fan_in(self) -> int:
        """I·ΠK: columns of the weight as a matrix."""
        return math.prod(self.shape[1:])

    @property
    def pointwise(self) -> bool:
        """Whether the weight is a plain matrix: linear, or a convolution with a kernel of ones."""
        return all(size == 1 for size in self.kernel)

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's operation with the given weight: x·Wᵀ + b, or the convolution with the layer's own settings.

        `weight` may have any number of rows and, when groups is 1, any number of columns that x has channels for.
        """
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        convolve = _CONVOLUTIONS[len(self.kernel)]
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.pad, mode=self.padding_mode), 0
            return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def mix(self, x: Tensor, weight: Tensor) -> Tensor:
        """Mix channels without touching positions: `weight` is (rows, channels), whatever the layer's kernel."""
        if self.kind == "linear":
            return F.linear(x, weight)
        ones = (1,) * len(self.kernel)
        return _CONVOLUTIONS[len(self.kernel)](x, weight.reshape(*weight.shape[:2], *ones))

    def channels(self, vector: Tensor) -> Tensor:
        """Shape a vector over channels (C) so that it broadcasts over a layer's input or output."""
        return vector.reshape(-1) if self.kind == "linear" else vector.reshape(-1, *(1,) * len(self.kernel))

    def spread(self, rows: Tensor, x: Tensor) -> Tensor:
        """Shape per-sample channel vectors (B, C) to broadcast over `x`, a batch of inputs or outputs.

        A batch that is n times as long as `rows` is read as n consecutive entries for each row, which is how video
        models fold frames into the batch.
        """
        if rows.shape[0] == 1:
            return self.channels(rows[0])
        batch = x.shape[0]
        if batch % rows.shape[0]:
            raise ValueError(f"a mask for {rows.shape[0]} samples cannot be spread over a batch of {batch}")
        rows = rows.repeat_interleave(batch // rows.shape[0], dim=0)
        between = (1,) * (x.dim() - 2)
        return rows.reshape(batch, *between, -1) if self.kind == "linear" else rows.reshape(batch, -1, *between)


def describe(module: nn.Module) -> Geometry | None:
    """The geometry of a layer that adapters can serve, or None for every other module."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # the projection inside nn.MultiheadAttention, which reads its weight and never calls it
    if isinstance(module, nn.Linear):
        # From the features, not from the weight: a 4-bit weight is packed into another shape.
        return Geometry(
            kind="linear", shape=(module.out_features, module.in_features), has_bias=module.bias is not None
        )
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Geometry(
            kind="conv",
            shape=(module.out_channels, module.in_channels // module.groups, *module.kernel_size),
            has_bias=module.bias is not None,
            stride=tuple(module.stride),
            padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
            dilation=tuple(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
            pad=tuple(module._reversed_padding_repeated_twice),
        )
    return None
