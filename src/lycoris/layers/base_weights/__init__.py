"""Base weights: one table of how layers store them, the one place to read a weight and the one place to write one.

Importing this imports none of the libraries in the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lycoris.errors import AttachError
from lycoris.layers import sharding
from lycoris.layers.base_weights.base import Storage
from lycoris.layers.base_weights.bitsandbytes import Bits4, Int8
from lycoris.layers.base_weights.dense import Dense, Float8, Unknown, is_dense
from lycoris.layers.base_weights.gguf import GGUF
from lycoris.layers.base_weights.quanto import Quanto
from lycoris.layers.base_weights.sdnq import SDNQ
from lycoris.layers.base_weights.torchao import TorchAO
from lycoris.layers.geometry import Affine, Geometry, describe

STORAGES: Sequence[Storage] = (Int8(), Bits4(), TorchAO(), Quanto(), GGUF(), SDNQ(), Float8(), Dense(), Unknown())
"""The first that holds a layer is its storage."""

NO_DERIVATIVE = "its forward has no derivative: backward stops here"


def storage(layer: nn.Module) -> Storage:
    """Return how a layer stores its weight: the first row of `STORAGES` that holds it.

    There always is one, since `Unknown` holds everything. The layer needs an attribute `weight`.
    """
    return next(row for row in STORAGES if row.holds(layer))


def kind(layer: nn.Module) -> str:
    """Return what a layer's weight is stored as, in words for reports and errors.

    Examples are "dense bfloat16", "bitsandbytes nf4" and "GGUF Q4_K".
    """
    return storage(layer).label(layer)


def own(layer: nn.Module) -> Affine:
    """Return a layer's parameters themselves, as it stores them.

    Nothing is decoded or copied: a packed weight has another shape than (O, I, *K). The bias is None where the layer
    has none.
    """
    weight: Any = layer.weight
    return Affine(weight, getattr(layer, "bias", None))


def read(layer: nn.Module) -> Affine:
    """Weight and bias of a layer as floating-point tensors: its own parameters, or what they stand for.

    Raises `AttachError` for a weight that cannot be read, or that other processes have parts of.
    """
    sharding.check_readable(layer, layer.weight)  # type: ignore[arg-type]
    return own(layer) if is_dense(layer) else read_as(layer, own(layer))


@torch.no_grad()
def read_as(layer: nn.Module, stored: Affine) -> Affine:
    """Return what `read` would give if the layer had these parameters, its own or ones from `rewritten`.

    No gradient reaches the stored parameters. A bias in float8 is widened to float32.

    Raises:
        AttachError: the layer's weight cannot be read densely.
    """
    row = storage(layer)
    if why := row.why_unreadable(layer):
        raise AttachError(
            f"{type(layer).__name__} stores its weight as {row.label(layer)}, which cannot be read densely: {why}. "
            "Algorithms that need only the layer's output (LoRA, LoHa, LoKr) work on it, unmerged"
        )
    bias = stored.bias
    return Affine(row.decode(layer, stored.weight), bias.float() if bias is not None and bias.itemsize == 1 else bias)


@torch.no_grad()
def rewritten(layer: nn.Module, affine: Affine, generator: torch.Generator | None = None) -> Affine:
    """New parameters for a layer, of the kind that it has, from a float32 or float64 weight and bias; rounded once.

    A generator asks for stochastic rounding of the weight. The layer is not changed.
    """
    old = own(layer)
    weight = storage(layer).encode(layer, affine.weight, generator)
    if weight.is_floating_point():
        weight.requires_grad_(old.weight.requires_grad)
    if affine.bias is None:
        return Affine(weight, None)
    like = read(layer).weight if old.bias is None else old.bias
    trained = (old.weight if old.bias is None else old.bias).requires_grad
    return Affine(weight, nn.Parameter(affine.bias.to(like.dtype), requires_grad=trained))


def install(layer: nn.Module, affine: Affine, attribute: str = "") -> None:
    """Give a layer, or the parameter of that name, these very parameters.

    The objects are installed, not copied; modules that shared the old ones keep those.

    Args:
        attribute: name of a bare parameter, of which only `affine.weight` is used. "": the layer's weight, and its bias
            where it registers one.
    """
    if attribute:
        layer._parameters[attribute] = affine.weight  # type: ignore[assignment]
        return
    storage(layer).install(layer, affine.weight)  # type: ignore[arg-type]
    if "bias" in layer._parameters:
        layer.bias = affine.bias  # type: ignore[assignment]


def stands_in(layer: nn.Module, geometry: Geometry | None) -> bool:
    """Whether the decoded weight can give the derivative of a layer whose own forward has none.

    Only where the table knows how the layer stores it, for then it is what the layer multiplies with.
    """
    row = storage(layer)
    linear = geometry is not None and geometry.kind in ("linear", "conv")
    return linear and row.low_bit and not row.why_unreadable(layer)


def movable(layer: nn.Module) -> bool:
    """Return whether a parameter of the layer that was set aside can follow it to another device or precision.

    True for dense and float8 storage, where the weight is a tensor with nothing beside it.
    """
    return storage(layer).plain


def is_float8(*dtypes: torch.dtype) -> bool:
    """Whether any of these is a floating-point format of eight bits."""
    return any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in dtypes)


def precision(layer: nn.Module) -> torch.dtype:
    """Return the dtype of a layer's own weight, parameter or buffer, or of its first parameter where it has none.

    For a packed weight that may be the dtype of the codes. float32 for a module without parameters of its own.
    """
    weight: Any = layer._parameters.get("weight", layer._buffers.get("weight"))
    weight = next(layer.parameters(recurse=False), None) if weight is None else weight
    return torch.float32 if weight is None else weight.dtype


def holder(layer: nn.Module, attribute: str) -> nn.Module:
    """Return a layer, or a module with the parameter of that name as its weight and nothing else.

    The parameter is shared, not copied. With "" as `attribute` the layer itself is returned.
    """
    if not attribute:
        return layer
    made = nn.Module()
    made.register_parameter("weight", layer._parameters[attribute])
    return made


def home(layer: nn.Module) -> dict[str, Any]:
    """Return where and how a layer's adapters keep their tensors: beside its weight, in float32.

    They are float64 where the weight is. The keys are `device` and `dtype`, as functions that make tensors take them.
    """
    weight: Any = layer.weight
    return {"device": weight.device, "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32}


@dataclass(frozen=True)
class Capability:
    """What works on the layers that store their weight in one way.

    Layers are counted together only if all fields but `layers` and `example` agree.
    """

    stored_as: str
    layers: int
    example: str
    """Path of one of them."""
    low_bit: bool
    trains: bool
    """Unmerged training, and with it the layers before this one."""
    reads: bool
    """Whether the dense weight can be had: DoRA, starts from the weight, and merging need it."""
    merges: bool
    """Without `low_bit` always, with it when asked for."""
    stochastic: bool
    """Whether such a merge can round stochastically."""
    remark: str = ""

    def row(self) -> tuple[str, ...]:
        merge = "no" if not self.merges else "when asked for" if self.low_bit else "yes"
        rounding = "-" if not self.merges else "nearest, stochastic" if self.stochastic else "nearest"
        trains, reads = ("yes" if able else "no" for able in (self.trains, self.reads))
        return self.stored_as, str(self.layers), trains, reads, merge, rounding, self.remark


@dataclass(frozen=True)
class Capabilities:
    """What works on the layers of a model, by how they store their weight.

    `str` gives it as a table, one row for each `Capability`. Make it with `capabilities`.
    """

    rows: tuple[Capability, ...] = field(default=())

    @property
    def low_bit(self) -> bool:
        return any(row.low_bit for row in self.rows)

    def __str__(self) -> str:
        head = ("base weight", "layers", "trains unmerged", "reads densely", "merges", "rounding", "")
        table = [head, *(row.row() for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
        return "\n".join(line.rstrip() for line in lines)


def capabilities(layers: Mapping[str, nn.Module], cut: Collection[str] = ()) -> Capabilities:
    """What works on these layers, by path. `cut`: some that were seen to have no derivative, which others like them
    have not either."""
    alike = {(type(layers[path]), kind(layers[path])) for path in cut}
    found: dict[tuple[Any, ...], list[str]] = {}
    for path, layer in layers.items():
        row = storage(layer)
        unreadable, unwritable = row.why_unreadable(layer), row.why_unwritable(layer)
        own = row.passes_gradient(layer) and (type(layer), row.label(layer)) not in alike
        trains = own or stands_in(layer, describe(layer))
        able = row.low_bit, trains, not unreadable, not (unreadable or unwritable)
        backward = "" if own else "no derivative of its own: backward decodes the weight" if trains else NO_DERIVATIVE
        remark = "; ".join(dict.fromkeys(why for why in (backward, unreadable, unwritable) if why))
        found.setdefault((row.label(layer), *able, row.stochastic(layer), remark), []).append(path)
    return Capabilities(
        tuple(
            Capability(label, len(paths), paths[0], low_bit, trains, reads, merges, stochastic, remark)
            for (label, low_bit, trains, reads, merges, stochastic, remark), paths in found.items()
        )
    )
