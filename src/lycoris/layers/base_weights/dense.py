"""Weights that are ordinary tensors: floating point of 16 bits or more, float8 storage, and what nobody can read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lycoris.errors import AttachError
from lycoris.layers.base_weights.base import Storage
from lycoris.layers.base_weights.block_scales import spread
from lycoris.layers.base_weights.sdnq import MARK as SDNQ
from lycoris.ops import rounding

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
"""What layers with float8 weights call the factor that the weight is to be multiplied with."""

OF_ACTIVATIONS = ("input", "activation", "output")
"""Parts of the names of scales that activations are divided by and the product is multiplied with again."""


def is_dense(layer: Any) -> bool:
    """Return the quick answer for nearly all layers: whether the weight is an ordinary parameter of 16 bits or more.

    `torch.compile` can follow it. False does not rule out `Dense` storage, which subclasses of tensors may have too.
    """
    weight = layer.weight
    # optimum-quanto's layers hold a plain parameter until they are frozen, SDNQ's codes may have a format of 16 bits.
    plain = type(weight) is nn.Parameter and _wide(weight)
    return plain and not hasattr(layer, "weight_qtype") and not hasattr(layer, SDNQ)


def _wide(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1


class Dense(Storage):
    """Floating point of 16 bits or more, whatever class of tensor holds it.

    Written in the dtype of the weight. Not writable where the weight is a buffer or is computed in every pass.
    """

    low_bit = False
    plain = True

    def holds(self, layer: Any) -> bool:
        return _wide(layer.weight)

    def label(self, layer: Any) -> str:
        return f"dense {_short(layer.weight.dtype)}"

    def why_unwritable(self, layer: Any) -> str:
        return _why_no_parameter(layer)

    def stochastic(self, layer: Any) -> bool:
        return True

    def decode(self, layer: Any, weight: Any) -> Tensor:
        return weight

    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        return nn.Parameter(rounding.to_dtype(dense, layer.weight.dtype, generator))


class Float8(Storage):
    """float8 in a layer whose own forward deals with it, with or without a scale beside it.

    W = scale · code, with a scale under one of the names in `SCALES`: a single one, or one per block. A merge keeps it.
    """

    plain = True

    def holds(self, layer: Any) -> bool:
        plain = type(layer.weight) in (nn.Parameter, Tensor)
        return plain and layer.weight.is_floating_point() and not _wide(layer.weight)

    def label(self, layer: Any) -> str:
        return f"{_short(layer.weight.dtype)} storage"

    def why_unreadable(self, layer: Any) -> str:
        if other := _other_scales(layer):
            return f"{', '.join(other)} beside it is not known here; known are {', '.join(SCALES)}"
        found, shape = _scale(layer), layer.weight.shape
        if found is None or found.numel() == 1:
            return ""
        if (block := _block(layer, found)) is not None:
            fits = found.shape == tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
            return "" if fits else f"its scale has shape {tuple(found.shape)}, and its blocks are {block}"
        sizes = found.shape[: len(shape)]
        fits = len(sizes) == len(shape) and all(size % blocks == 0 for size, blocks in zip(shape, sizes, strict=True))
        if fits and found.numel() == sizes.numel():
            return ""
        return f"its scale has shape {tuple(found.shape)}; known are a single one, and one per block and axis"

    def why_unwritable(self, layer: Any) -> str:
        return _why_no_parameter(layer)

    def stochastic(self, layer: Any) -> bool:
        return True

    def decode(self, layer: Any, weight: Any) -> Tensor:
        return weight.float() * self._scale(layer)

    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        # The scale stays: it is a buffer of the layer, and state dicts of the base must not change.
        return nn.Parameter(rounding.to_dtype(dense / self._scale(layer), layer.weight.dtype, generator))

    def _scale(self, layer: Any) -> Tensor | float:
        found, shape = _scale(layer), layer.weight.shape
        if found is None:
            return 1.0
        if (block := _block(layer, found)) is None:
            return spread(found.float(), shape)
        rows, columns = (torch.arange(n, device=found.device) // step for n, step in zip(shape, block, strict=True))
        return found.float()[rows[:, None], columns]


def _why_no_parameter(layer: Any) -> str:
    if "weight" in layer._parameters:
        return ""
    if "weight" in layer._buffers:
        return "it is a buffer of its module, and no parameter"
    return "it is made of other parameters in every pass (remove_parametrizations of torch.nn.utils ends that)"


def _other_scales(layer: Any) -> list[str]:
    """Tensors of a layer that its weight may have to be scaled by, in a way that is not known."""
    names = (name for name in (*layer._parameters, *layer._buffers) if "scale" in name and name not in SCALES)
    mine = (name for name in names if not any(part in name for part in OF_ACTIVATIONS))
    return [name for name in mine if getattr(layer, name) is not None]


def _block(layer: Any, scale: Tensor) -> tuple[int, int] | None:
    """Rows and columns that share a scale, in layers that say so: their last blocks may be smaller."""
    block = getattr(layer, "block_size", None)
    return tuple(block) if block is not None and len(block) == scale.dim() == 2 and scale.numel() > 1 else None


def _scale(layer: Any) -> Tensor | None:
    scales = (getattr(layer, name, None) for name in SCALES)
    found = next((scale for scale in scales if scale is not None), None)
    by_row = found is not None and 1 < found.numel() == len(found) == len(layer.weight)
    return found.reshape(-1, 1) if found is not None and by_row else found


class Unknown(Storage):
    """Anything else: adapters that need only the layer's output work on it.

    Reading and writing raise `AttachError`.
    """

    def holds(self, layer: Any) -> bool:
        return True

    def label(self, layer: Any) -> str:
        return f"{type(layer).__name__} of {_short(layer.weight.dtype)}"

    def why_unreadable(self, layer: Any) -> str:
        return "this library does not know how it is packed"

    def why_unwritable(self, layer: Any) -> str:
        return self.why_unreadable(layer)

    def decode(self, layer: Any, weight: Any) -> Tensor:
        raise AttachError(self.why_unreadable(layer))

    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        raise AttachError(self.why_unwritable(layer))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
