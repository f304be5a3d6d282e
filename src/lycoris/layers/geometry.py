"""What a layer is to an adapter: its kind, its shapes, and its operation as a function of weight and bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lycoris.layers import batch_layout
from lycoris.layers.batch_layout import BatchLayout

Kind = Literal["linear", "conv", "embedding", "norm", "parameter"]
Norm = Literal["", "layer", "group", "rms", "own"]

IS_ADAPTER = "is_lycoris_adapter"
"""Attribute of the class of adapters, whose own parameters are no place for more of them."""

_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Affine(NamedTuple):
    """A layer's weight and bias.

    The bias is None where the layer has none. Which axes the weight has is up to the source: `LayerBelow.affine` gives
    (O, I, *K), and `base_weights.read` what the module stores.
    """

    weight: Tensor
    bias: Tensor | None

    def widen(self, dtype: torch.dtype) -> Affine:
        """Return both in at least that precision.

        The dtype is the one that torch promotes the weight's and `dtype` to, for the bias as well. Tensors that have it
        already are not copied.
        """
        wide = torch.promote_types(self.weight.dtype, dtype)
        return Affine(self.weight.to(wide), None if self.bias is None else self.bias.to(wide))

    def like(self, other: Affine) -> Affine:
        """Return both in the precision of another, weight and bias each in that of its counterpart.

        The bias stays as it is where either of the two has none.
        """
        bias = self.bias if self.bias is None or other.bias is None else self.bias.to(other.bias.dtype)
        return Affine(self.weight.to(other.weight.dtype), bias)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shapes and operation of one layer. Tensors only; holds no weights.

    Legend: O out features or channels, I in features or channels *per group*, K kernel dimensions. An embedding is a
    linear map from one-hot vectors: O is its width, I the number of its entries.
    """

    kind: Kind
    shape: tuple[int, ...]
    """Of the weight: (O, I) or (O, I, *K); of a norm, the shape that it scales."""
    has_bias: bool = True
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    """Of a convolution's channels; of a group norm's."""
    padding_mode: str = "zeros"
    pad: tuple[int, ...] = ()
    """`F.pad` amounts that stand for `padding`, last dimension first."""
    transposed: bool = False
    """Whether the module stores (I, O): embeddings and the `Conv1D` of transformers."""
    stack: int = 0
    """Of a parameter of three dimensions: how many matrices (O, I) it holds. 0: it is one matrix."""
    norm: Norm = ""
    """Which normalization; "own": one that only the module itself can compute."""
    eps: float | None = None

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs of one group.

        The entries of an embedding. See `channels_in` for those of all groups.
        """
        return self.shape[1]

    @property
    def channels_in(self) -> int:
        """Inputs of all groups together: the channels that one position of the input holds.

        For an embedding it is the number of entries.
        """
        return self.shape[1] * (self.groups if self.kind == "conv" else 1)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel dimensions K, such as (3, 3).

        Empty for layers without one.
        """
        return self.shape[2:]

    @property
    def fan_in(self) -> int:
        """I·ΠK: columns of the weight as a matrix."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Numbers in one weight."""
        return math.prod(self.shape)

    @property
    def pointwise(self) -> bool:
        """Whether the weight is a plain matrix: linear, or a convolution with a kernel of ones."""
        return all(size == 1 for size in self.kernel)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in which the module keeps one weight.

        (I, O) for transposed layers, else `shape`. The axis of a stack is not in it; see `stacked_shape`.
        """
        return self.shape[::-1] if self.transposed else self.shape

    def stacked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what there is one of for each matrix of a stack: (E, *shape).

        Where the layer is no stack, it is `shape` itself.
        """
        return (self.stack, *shape) if self.stack else shape

    def transpose_stored(self, weight: Tensor) -> Tensor:
        """Return a weight as the module stores it in the order (O, I, ...), and back.

        The result is a view, or the weight itself where the module stores that order.
        """
        return weight.transpose(-1, -2) if self.transposed else weight

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's operation with the given weight: x·Wᵀ + b, or the convolution with the layer's own settings.

        `weight` may have any number of rows and, when groups is 1, any number of columns that x has channels for.
        """
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        if self.kind == "embedding":
            y = F.embedding(x, weight.T)
            return y if bias is None else y + bias
        if self.kind == "conv":
            if self.padding_mode != "zeros":
                return self.convolve(F.pad(x, self.pad, mode=self.padding_mode), weight, bias, padding=0)
            return self.convolve(x, weight, bias, padding=self.padding)
        return self._normalize(x, weight, bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: Any) -> Tensor:
        """Run the convolution alone, with `padding` in place of the layer's own.

        Stride, dilation and groups are the layer's. Only for layers of kind "conv".

        Args:
            padding: as `torch.nn.functional.conv2d` takes it.
        """
        run = _CONVOLUTIONS[len(self.kernel)]
        return run(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def pad_input(self, x: Tensor) -> Tensor:
        """Return the input of a convolution with the layer's padding around it.

        The values there follow `padding_mode`. Run `convolve` with a padding of 0 on the result.
        """
        return F.pad(x, self.pad, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    @property
    def even_padding(self) -> tuple[int, ...] | None:
        """Zeros on both sides of each dimension of a convolution's input, first dimension first.

        None for any other padding: other values than zeros, or different amounts on the two sides.
        """
        if self.padding_mode != "zeros" or self.pad[::2] != self.pad[1::2]:
            return None
        return self.pad[::-2]

    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.norm == "layer":
            return F.layer_norm(x, self.shape, weight, bias, self.eps or 0.0)
        if self.norm == "group":
            return F.group_norm(x, self.groups, weight, bias, self.eps or 0.0)
        if self.norm == "rms":
            return F.rms_norm(x, self.shape, weight, self.eps)
        raise TypeError(f"a {self.kind} {self.norm} has no operation of its own; run the layer with the new weight")

    @property
    def channels_last(self) -> bool:
        """Whether features are the last dimension of inputs and outputs."""
        return self.kind != "conv"

    @property
    def channel_axis(self) -> int:
        """The axis of features in inputs and outputs, counted from the end, since a batch dimension may be missing.

        -1, or -1 - len(K) for a convolution.
        """
        return -1 - (len(self.kernel) if self.kind == "conv" else 0)

    def mix(self, x: Tensor, weight: Tensor) -> Tensor:
        """Mix channels without touching positions, whatever the layer's kernel.

        Args:
            x: channels on `channel_axis`, as inputs and outputs of the layer have them.
            weight: (rows, channels); the result has `rows` channels.
        """
        if self.channels_last:
            return F.linear(x, weight)
        ones = (1,) * len(self.kernel)
        return _CONVOLUTIONS[len(self.kernel)](x, weight.reshape(*weight.shape[:2], *ones))

    def channels(self, vector: Tensor) -> Tensor:
        """Shape a vector over channels (C) so that it broadcasts over a layer's input or output.

        (C) where channels are last, (C, 1, ...) for a convolution.
        """
        return vector.reshape(-1) if self.channels_last else vector.reshape(-1, *(1,) * len(self.kernel))

    def spread(self, rows: Tensor, x: Tensor, layout: BatchLayout | None = None) -> Tensor:
        """Shape per-sample channel vectors (B, C) to broadcast over `x`, an input or output of the layer.

        Raises `ConfigError` where it is not known which entries of x belong to which sample; see `BatchLayout`.
        """
        if rows.shape[0] == 1:
            return self.channels(rows[0])
        if self.channels_last:
            lengths = x.shape[:-1]
        else:
            lengths = x.shape[:1] if x.dim() == len(self.kernel) + 2 else x.shape[:0]
        axis, rows = batch_layout.place_rows(rows, lengths, layout)
        if not self.channels_last:
            return rows.reshape(*rows.shape, *(1,) * len(self.kernel))
        return rows.reshape(*(1,) * axis, len(rows), *(1,) * (len(lengths) - axis - 1), -1)

    def __str__(self) -> str:
        stack = f"{self.stack} x " if self.stack else ""
        return f"{self.kind} {stack}{self.shape}"


def describe_parameter(parameter: Tensor) -> Geometry | None:
    """Return the geometry of a bare parameter: a matrix (O, I), or a stack of them as experts have (E, O, I).

    None for any other number of dimensions, and for integers that are not on the meta device.
    """
    if parameter.dim() not in (2, 3) or not (parameter.is_floating_point() or parameter.is_meta):
        return None
    *stack, o, i = parameter.shape
    return Geometry(kind="parameter", shape=(o, i), has_bias=False, stack=stack[0] if stack else 0)


def describe(module: nn.Module) -> Geometry | None:
    """Return the geometry of a layer that adapters can serve, or None for every other module.

    Served are linear layers, convolutions over 1 to 3 dimensions, embeddings and norms with a weight. None also for an
    embedding with `max_norm`, which changes its weight in forward, and for the output projection of
    `nn.MultiheadAttention`, which is never called.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # the projection inside nn.MultiheadAttention, which reads its weight and never calls it
    if isinstance(module, nn.Linear):
        # From the features, not from the weight: a 4-bit weight is packed into another shape.
        return Geometry(
            kind="linear", shape=(module.out_features, module.in_features), has_bias=module.bias is not None
        )
    if _is_float8_linear(module):
        other: Any = module
        shape = (other.out_features, other.in_features)
        return Geometry(kind="linear", shape=shape, has_bias=getattr(module, "bias", None) is not None)
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
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        shape = (module.embedding_dim, module.num_embeddings)
        return Geometry(kind="embedding", shape=shape, has_bias=False, transposed=True)
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        # transformers' linear layer of GPT-2; not imported here for its weight's sake.
        layer: Any = module
        return Geometry(kind="linear", shape=(layer.nf, layer.weight.shape[0]), transposed=True)
    return _describe_norm(module)


def _is_float8_linear(module: nn.Module) -> bool:
    """Trainers' own linear layers with a weight in float8, which need not derive from torch's."""
    have = all(hasattr(module, name) for name in ("in_features", "out_features", "weight", "weight_scale"))
    return have and type(module).__name__ == "Fp8Linear"


def _describe_norm(module: Any) -> Geometry | None:
    eps: float | None
    if isinstance(module, nn.LayerNorm):
        shape, norm, eps, groups = tuple(module.normalized_shape), "layer", module.eps, 1
    elif isinstance(module, nn.GroupNorm):
        shape, norm, eps, groups = (module.num_channels,), "group", module.eps, module.num_groups
    elif isinstance(module, nn.RMSNorm):
        shape, norm, eps, groups = tuple(module.normalized_shape), "rms", module.eps, 1
    elif _is_norm_by_name(module):
        shape, norm, eps, groups = tuple(module.weight.shape), "own", None, 1
    else:
        return None
    if getattr(module, "weight", None) is None:
        return None
    has_bias = getattr(module, "bias", None) is not None
    return Geometry(kind="norm", shape=shape, norm=norm, eps=eps, groups=groups, has_bias=has_bias)  # type: ignore[arg-type]


def _is_norm_by_name(module: nn.Module) -> bool:
    """The RMS norms that model libraries define for themselves: a vector to scale by, and Norm in the name."""
    weight = module._parameters.get("weight")
    batched = isinstance(module, nn.modules.batchnorm._NormBase)
    return (
        "Norm" in type(module).__name__
        and not batched
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 1
        and set(module._parameters) <= {"weight", "bias"}
    )
