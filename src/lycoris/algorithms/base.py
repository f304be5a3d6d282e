"""The contract of an algorithm: a frozen value whose fields are its settings and whose methods are pure maths.

To write one, implement `slots`, `initialize`, `transform` and `infer`; everything else has a default that is correct.
What may be overridden beyond this file is in four others, by concern: `cost` (FLOPs and memory), `call` (dropout and
rank masks), `serialization` (names and shapes in files), `row_selection` (fused and split layers).

Legend: O out features, I in features per group, K kernel dimensions, r rank, B batch, g a layer's `Geometry`,
p an adapter's tensors by slot name, W the weight below, V the adapted weight, μ strength.

Strength is one rule for every algorithm: the layer behaves as W + μ(V - W), and its bias likewise. Strength 0 is
exactly the layer below, strength 1 the adapted one, and all other values lie on the same straight line.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.call import Call, PassHooks, require_one_mask
from lycoris.algorithms.cost import CostHooks
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.row_selection import RowHooks
from lycoris.algorithms.serialization import FileHooks
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError, check_type, unknown
from lycoris.layers.geometry import Affine, Geometry, Kind


@dataclass(frozen=True, kw_only=True)
class Algorithm(PassHooks, CostHooks, FileHooks, RowHooks, ABC):
    """Settings of one method and its maths. `transform` is the definition; `forward` is the same, faster.

    A value without tensors of its own: equal settings are equal algorithms, and one serves any number of layers. A
    setting of the wrong type, or a dropout outside [0, 1), raises `ConfigError` when it is made.
    """

    name: ClassVar[str]
    """Name in config files and reports."""
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "embedding", "parameter")
    """Kinds of layers that it can adapt."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            check_type(f"{f.name} of {self.name}", str(f.type), value)
            if f.name.endswith("dropout") and not 0 <= value < 1:
                raise ConfigError(f"{f.name} of {self.name} is a probability of at least 0 and below 1, not {value!r}")

    @abstractmethod
    def slots(self, g: Geometry) -> dict[str, Slot]:
        """Return the tensors that this algorithm keeps for a layer, by slot name.

        Raises:
            ConfigError: these settings cannot serve the layer.
        """

    @abstractmethod
    def initialize(self, p: Params, below: LayerBelow) -> None:
        """Fill every tensor in place, so that the layer's output does not change.

        Call it under `torch.no_grad()` if they train.

        Args:
            p: tensors by slot name, of the shapes that `slots` gives.
            below: the layer; algorithms that start from its weight read it.
        """

    @abstractmethod
    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        """Return the weight and bias that this adapter makes of those below, at strength 1: the definition.

        Works in the dtype of its arguments and is differentiable.

        Args:
            p: tensors by slot name.
            base: weight (O, I, *K) and bias (O) below.
            rank_mask: weight of each rank (r); None where every rank counts fully.
        """

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        """Return the adapted layer's output for x at `call.strength`, equal to that of the merged weight.

        The default builds V. Override it with whatever is faster.
        """
        return dense_forward(self, p, below, x, call)

    @classmethod
    @abstractmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        """Return the settings under which a file's tensors were trained.

        Args:
            p: tensors by slot name, with the shapes of the file.
            alpha: as stored; None when the file has none.

        Raises:
            ConfigError, KeyError, ValueError: they fit no settings. The reader adds the layer and the shapes.
        """

    def scale(self, g: Geometry) -> float:
        """Return the factor of ΔW, mostly alpha / rank. It is applied exactly once wherever ΔW is used.

        The default is 1.0, for algorithms without an alpha.
        """
        return 1.0

    @property
    def changes_bias(self) -> bool:
        """Whether it changes the bias of a layer that has one.

        False by default: the adapted layer then keeps the bias below, and DoRA may go over it.
        """
        return False

    def check(self, g: Geometry) -> None:
        """Check that this algorithm can serve a layer; `slots` is asked as well.

        Raises:
            ConfigError: it cannot. For a kind that it does not serve, the message says what to do instead.
        """
        if g.kind not in self.kinds:
            instead = "norms take Norm()" if g.kind == "norm" else "leave it out, or give it LoRA()"
            raise ConfigError(f"{self.name} serves {', '.join(self.kinds)}, not a {g.kind}; {instead}")
        self.slots(g)

    def __str__(self) -> str:
        """Like the repr, without settings that have their default value; the rank is always shown."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        shown = [(name, value) for name, (value, default) in values.items() if name == "rank" or value != default]
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown)})"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build an algorithm from settings by name; those left out have their defaults.

        Raises:
            ConfigError: it has no setting of that name, or a value is not valid for it.
        """
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise ConfigError(unknown(f"option for {cls.name}", name, known))
        return cls(**options)


class Entry(NamedTuple):
    """One algorithm on one layer, with its tensors.

    The tensors are referred to and not copied. They may lack frozen ones that the base weight determines.
    """

    algorithm: Algorithm
    geometry: Geometry
    tensors: dict[str, Tensor]
    """By slot name."""


def interpolate(base: Affine, adapted: Affine, strength: Tensor | float) -> Affine:
    """Return base + μ(adapted - base) for weight and bias: the definition of strength.

    A bias that only the adapted layer has is multiplied by μ. Strengths below 0 and above 1 are on the same line.
    """
    if adapted.bias is None:
        bias = None
    elif base.bias is None:
        bias = adapted.bias * strength
    else:
        bias = base.bias + strength * (adapted.bias - base.bias)
    return Affine(base.weight + strength * (adapted.weight - base.weight), bias)


def dense_forward(algorithm: Algorithm, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
    """Return the output of the layer with μ(V - W) added to its weight and bias, by the definition.

    Right for every algorithm, and slow: V is built in each pass. V - W is taken in the adapter's precision and never
    added to a half-precision W. A norm, which no product with a weight describes, runs once with the new one.
    """
    if below.geometry.kind == "norm":
        return run_adapted(algorithm, p, below, x, call)
    g, base, y = below.geometry, below.affine(), below(x)
    wide, adapted = _adapt(algorithm, p, base, g, call)
    change = ((adapted.weight - wide.weight) * call.strength).to(y.dtype)
    y = y + g.op(x, change).to(y.dtype)
    if not algorithm.changes_bias or adapted.bias is None:
        return y
    shift = adapted.bias if wide.bias is None else adapted.bias - wide.bias
    return y + g.channels((shift * call.strength).to(y.dtype))


def run_adapted(algorithm: Algorithm, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
    """Run the layer once with its adapted weight and bias, which are summed in the adapter's precision.

    A small change of a half-precision weight would round away otherwise.
    """
    base = below.affine()
    wide, adapted = _adapt(algorithm, p, base, below.geometry, call)
    return below.run(x, interpolate(wide, adapted, call.strength).like(base))


def _adapt(algorithm: Algorithm, p: Params, base: Affine, g: Geometry, call: Call) -> tuple[Affine, Affine]:
    """Return weight and bias below and adapted, in the adapter's precision."""
    wide = base.widen(next(iter(p.values())).dtype)
    return wide, algorithm.transform(p, wide, g, None if call.rank_mask is None else require_one_mask(call.rank_mask))


def in_dtype_of(x: Tensor, p: Params) -> Params:
    """Return the tensors in the dtype of x. Under autocast they stay as they are, since operations convert them.

    p itself where nothing has to be converted. Gradients pass through the conversion.
    """
    dtype = x.dtype
    for tensor in p.values():
        if tensor.dtype != dtype:
            break
    else:
        return p
    if torch.is_autocast_enabled(x.device.type):
        return p
    return {name: tensor.to(x.dtype) for name, tensor in p.items()}


def uniform_like_linear(tensor: Tensor, fan_in: int) -> None:
    """Fill a tensor with U(-1/√fan_in, 1/√fan_in), as PyTorch initializes linear layers.

    The tensor is changed in place. A fan_in below 1 counts as 1.
    """
    bound = 1 / math.sqrt(max(fan_in, 1))
    torch.nn.init.uniform_(tensor, -bound, bound)
