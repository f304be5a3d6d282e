"""The contract of an algorithm: a frozen value whose fields are its settings and whose methods are pure maths.

Legend: O out features, I in features per group, K kernel dimensions, r rank, B batch, g a layer's `Geometry`,
p an adapter's tensors by slot name, W the weight below, V the adapted weight, μ strength.

Strength is one rule for every algorithm: the layer behaves as W + μ(V - W), and its bias likewise. Strength 0 is the
layer below exactly, strength 1 the adapted one; what is between or beyond lies on the same straight line.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.errors import ConfigError, PlanError, unknown
from lycoris.geometry import Geometry

Params = Mapping[str, Tensor]
Role = Literal["in", "out", "core", "gate", "length", "delta", "frozen"]


class Affine(NamedTuple):
    """A layer's weight and bias."""

    weight: Tensor
    bias: Tensor | None


class Slot(NamedTuple):
    """A tensor that an algorithm keeps per layer.

    `role` groups parameters in a trainer: "in" and "out" are the sides of a factorisation (LoRA+ gives them separate
    learning rates), "core" lies between them, "gate" scales, "length" is a norm (kept in float32 or better: rounding
    it would change the layer by itself), "delta" is stored densely, "frozen" is not trained.
    """

    shape: tuple[int, ...]
    role: Role

    @property
    def trainable(self) -> bool:
        return self.role != "frozen"


@dataclass(frozen=True, eq=False)
class Call:
    """What is in force for one forward pass; never saved with the adapter."""

    strength: Tensor | float = 1.0
    """μ, as a 0-d tensor in a live adapter: a compiled graph does not depend on its value."""
    keep: Tensor | None = None
    """Which of the algorithm's droppable ranks count: (1, r) for all samples, or (B, r). None: all of them."""


class Base(Protocol):
    """Whatever lies below an adapter: a layer, or a layer with adapters on it."""

    @property
    def geometry(self) -> Geometry: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def affine(self) -> Affine:
        """Dense weight and bias, as a merge would leave them."""


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """Settings of one method and its maths. `transform` is the definition; `forward` is the same thing, faster."""

    name: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    """Slot name → tensor name in adapter files, as LyCORIS, kohya and ComfyUI spell it."""

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_type(f"{f.name} of {self.name}", str(f.type), getattr(self, f.name))

    @abstractmethod
    def slots(self, g: Geometry) -> dict[str, Slot]:
        """The tensors this algorithm keeps for a layer. Raises `ConfigError` when it cannot serve the layer."""

    @abstractmethod
    def initialise(self, p: Params, below: Base) -> None:
        """Fill the tensors in place so that the layer's effect does not change."""

    @abstractmethod
    def transform(self, p: Params, base: Affine, g: Geometry, keep: Tensor | None = None) -> Affine:
        """THE definition: the weight and bias that this adapter makes of those below, at strength 1.

        `keep` is (r), a mask over droppable ranks. Works in the dtype of its arguments and is differentiable.
        """

    @abstractmethod
    def forward(self, p: Params, below: Base, x: Tensor, call: Call) -> Tensor:
        """What the layer gives with this adapter on it, at `call.strength`, equal to the merged weight's output."""

    @classmethod
    @abstractmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        """Settings read off the tensors of a file. `alpha` as stored, None when the file has none."""

    def scale(self, g: Geometry) -> float:
        """What the change to the weight is multiplied by, exactly once, wherever it is used."""
        return 1.0

    def complete(self, p: Params, below: Base) -> dict[str, Tensor]:
        """Tensors of a file with those added that it may leave out because the base weight determines them."""
        return dict(p)

    def stored(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        """Tensors as they go into a file: trained gates folded into a factor, so that every reader applies them."""
        return dict(p)

    def stored_alpha(self, g: Geometry) -> float | None:
        """The alpha that makes a plain reader, which divides it by the rank, arrive at our scale. None: no alpha."""
        return None

    def fit_keep(self, keep: Tensor) -> Tensor:
        """A mask (..., n) over as many ranks as this algorithm has. Only `rank_masked` ones have any."""
        return keep

    @property
    def rank_masked(self) -> bool:
        """Whether `Call.keep` says anything to this algorithm, so that its effect may differ from step to step."""
        return False

    def __str__(self) -> str:
        """Like the repr, without settings other than the rank that are at their default."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        told = [(name, value) for name, (value, default) in values.items() if name == "rank" or value != default]
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in told)})"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from settings by name. Raises `ConfigError` for one that this algorithm does not have."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise ConfigError(unknown(f"option for {cls.name}", name, known))
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class Additive(Algorithm):
    """An algorithm that adds something to the weight whatever the weight is: V = W + scale·ΔW."""

    @abstractmethod
    def delta(self, p: Params, g: Geometry, keep: Tensor | None = None) -> Affine:
        """ΔW (and Δb), without the scale."""

    def transform(self, p: Params, base: Affine, g: Geometry, keep: Tensor | None = None) -> Affine:
        change, scale = self.delta(p, g, keep), self._gate(p) * self.scale(g)
        bias = base.bias
        if change.bias is not None:
            bias = change.bias * scale if bias is None else bias + change.bias * scale
        return Affine(base.weight + (change.weight * scale).to(base.weight.dtype), bias)

    def forward(self, p: Params, below: Base, x: Tensor, call: Call) -> Tensor:
        return below(x) + self.added(p, below.geometry, x, call)

    def added(self, p: Params, g: Geometry, x: Tensor, call: Call) -> Tensor:
        """What the adapter adds to the layer's output: μ·scale·ΔW applied to x."""
        p = in_dtype_of(x, p)
        gain = call.strength * (self._gate(p) * self.scale(g))
        # A grouped weight has so few columns that its ΔW costs less than factors applied group by group.
        product = Additive.product if g.groups > 1 else type(self).product
        return product(self, p, g, x, gain, call.keep)

    def product(self, p: Params, g: Geometry, x: Tensor, gain: Tensor | float, keep: Tensor | None) -> Tensor:
        """gain·ΔW applied to x. This dense way is always right; algorithms override it with a factored one."""
        change = self.delta(p, g, None if keep is None else one_mask(keep))
        bias = None if change.bias is None else change.bias * gain
        return g.op(x, change.weight * gain, bias)

    def _gate(self, p: Params) -> Tensor | float:
        return p.get("gate", 1.0)


@dataclass(frozen=True, kw_only=True)
class Ranked(Additive):
    """An additive algorithm with a rank and the scale convention alpha / rank."""

    rank: int = 4
    """Width of the factorisation, at least 1."""
    alpha: float | None = None
    """ΔW is multiplied by alpha / rank. None: alpha is the rank, so the scale is 1."""
    rs_lora: bool = False
    """Divide alpha by √rank instead, so that the scale does not vanish at high rank (arXiv:2312.03732)."""
    gate: bool = False
    """Train a scalar, starting at 0, that multiplies ΔW; no factor then needs to start at zero."""

    GATE_FOLDS_INTO: ClassVar[tuple[str, ...]]
    """Slots that can take the gate when a file is written; the first one present does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigError(f"rank of {self.name} must be a whole number of at least 1, not {self.rank!r}")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ConfigError(f"alpha of {self.name} must be finite, not {self.alpha!r}")

    def scale(self, g: Geometry) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rs_lora else self.rank)

    def stored_alpha(self, g: Geometry) -> float | None:
        if self.rs_lora:
            return self.scale(g) * self.rank
        return float(self.rank if self.alpha is None else self.alpha)

    def stored(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        tensors = dict(p)
        gate = tensors.pop("gate", None)
        if gate is not None:
            slot = next(name for name in self.GATE_FOLDS_INTO if name in tensors)
            tensors[slot] = tensors[slot] * gate
        return tensors

    def _gate_slot(self) -> dict[str, Slot]:
        return {"gate": Slot((1,), "gate")} if self.gate else {}

    def _start_at_zero(self, p: Params, slot: str) -> None:
        """Make ΔW zero at the start: through the gate if there is one, else through `slot`."""
        torch.nn.init.zeros_(p["gate"] if self.gate else p[slot])


def _check_type(what: str, annotation: str, value: Any) -> None:
    """Raise `ConfigError` unless a field of truth values, whole numbers or numbers holds one.

    Python would take "no" for true and True for 1. Fields of other types are for their classes to check.
    """
    words = {"bool": "True or False", "int": "a whole number", "float": "a number"}
    kind, _, optional = annotation.partition(" | ")
    if kind not in words or (optional == "None" and value is None):
        return
    fits: Mapping[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float)}
    if not isinstance(value, fits[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{what} must be {words[kind]}, not {value!r}")


def interpolate(base: Affine, adapted: Affine, strength: Tensor | float) -> Affine:
    """Strength, defined: base + μ(adapted - base), for weight and bias."""
    if adapted.bias is None:
        bias = None
    elif base.bias is None:
        bias = adapted.bias * strength
    else:
        bias = base.bias + strength * (adapted.bias - base.bias)
    return Affine(base.weight + strength * (adapted.weight - base.weight), bias)


def in_dtype_of(x: Tensor, p: Params) -> Params:
    """Tensors in the dtype of the activations. Under autocast the operations convert by themselves."""
    if torch.is_autocast_enabled(x.device.type):
        return p
    return {name: tensor.to(x.dtype) for name, tensor in p.items()}


def one_mask(keep: Tensor) -> Tensor:
    """The mask (r) of a call in which all samples share one. A weight cannot differ from sample to sample."""
    if keep.dim() == 1:
        return keep
    if keep.shape[0] != 1:
        raise PlanError(
            f"a dense weight is needed here, and one weight cannot follow {keep.shape[0]} masks; put algorithms that "
            "need the weight (DoRA) below the one with a timestep schedule, or give all samples one mask"
        )
    return keep[0]


def uniform_like_linear(tensor: Tensor, fan_in: int) -> None:
    """U(-1/√fan_in, 1/√fan_in), as PyTorch initialises linear layers."""
    bound = 1 / math.sqrt(max(fan_in, 1))
    torch.nn.init.uniform_(tensor, -bound, bound)
