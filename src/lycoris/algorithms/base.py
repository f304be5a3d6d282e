"""The contract of an algorithm: a frozen value whose fields are its settings and whose methods are pure maths.

Legend: O out features, I in features per group, K kernel dimensions, r rank, B batch, g a layer's `Geometry`,
p an adapter's tensors by slot name, W the weight below, V the adapted weight, μ strength.

Strength is one rule for every algorithm: the layer behaves as W + μ(V - W), and its bias likewise. Strength 0 is the
layer below exactly, strength 1 the adapted one; what is between or beyond lies on the same straight line.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.errors import AttachError, ConfigError, PlanError, check_type, unknown
from lycoris.layers.batch_layout import BatchLayout
from lycoris.layers.geometry import Affine, Geometry, Kind
from lycoris.ops.blocks import Run

Params = Mapping[str, Tensor]
Role = Literal["in", "out", "core", "gate", "length", "delta", "rotation", "frozen"]


class Slot(NamedTuple):
    """A tensor that an algorithm keeps per layer.

    `role` groups parameters in a trainer: "in" and "out" are the sides of a factorisation (LoRA+ gives them separate
    learning rates), "core" lies between them, "gate" scales, "length" is a norm (kept in float32 or better: rounding
    it would change the layer by itself), "delta" is stored densely, "rotation" generates rotations, "frozen" is not
    trained. Ranks are the first axis of every "in" tensor.
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
    """μ: a number, or a 0-d tensor where a compiled graph must not depend on its value."""
    keep: Tensor | None = None
    """How much each of the algorithm's ranks counts, mostly 0 or 1: (1, r), or (B, r). None: all of them, fully."""
    layout: BatchLayout | None = None
    """Which entries of an input belong to which row of `keep`."""
    dropping: Tensor | None = None
    """1 in training, 0 in evaluation: what the dropout probabilities are multiplied by. None: no dropout."""


class Cost(NamedTuple):
    """What an adapter adds to the work of one layer in a pass over some tokens; parts that do not grow with
    the tokens are spread over them."""

    path: str
    """How it is computed: factored, dense (ΔW is built), turned, scaled, or what else an algorithm does."""
    why: str
    work: float
    """Multiplications per token, forward."""
    training: float
    """Multiplications per token, forward and backward."""
    kept: int = 0
    """Numbers per token kept for backward, beside the input of the layer; tensors of parameters are not counted."""
    flags: int = 0
    """Bytes per token kept for backward beside them: what dropout chose."""
    needs_input: bool = True
    """Whether backward needs the layer's input, which a frozen linear layer does not keep and a convolution does."""


class Base(Protocol):
    """Whatever lies below an adapter: a layer, or a layer with adapters on it."""

    @property
    def geometry(self) -> Geometry: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def affine(self) -> Affine:
        """Dense weight and bias, as a merge would leave them."""

    def bias(self) -> Tensor | None:
        """The bias alone, which costs no reading of the weight."""

    def plain(self, x: Tensor) -> Affine | None:
        """Weight and bias when calling this is `geometry.op(x, weight, bias)` and nothing else, in x's precision."""

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        """The layer's operation with another weight and bias."""


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """Settings of one method and its maths. `transform` is the definition; `forward` is the same thing, faster."""

    module_dropout: float = 0.0
    """Probability that a training step leaves the adapter of a layer out; from 0 up to, but not, 1."""

    name: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    """Slot name → tensor name in adapter files, as LyCORIS, kohya and ComfyUI spell it."""
    marks: ClassVar[tuple[str, ...]] = ()
    """Names among `keys` that are settings kept as tensors in a file, not slots."""
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "embedding", "parameter")
    """Kinds of layers that it serves."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            check_type(f"{f.name} of {self.name}", str(f.type), value)
            if f.name.endswith("dropout") and not 0 <= value < 1:
                raise ConfigError(f"{f.name} of {self.name} is a probability from 0 up to, but not, 1, not {value!r}")

    @abstractmethod
    def slots(self, g: Geometry) -> dict[str, Slot]:
        """The tensors this algorithm keeps for a layer. Raises `ConfigError` when it cannot serve the layer."""

    @abstractmethod
    def initialise(self, p: Params, below: Base) -> None:
        """Fill the tensors in place so that the layer's effect does not change."""

    @abstractmethod
    def transform(self, p: Params, base: Affine, g: Geometry, keep: Tensor | None = None) -> Affine:
        """THE definition: the weight and bias that this adapter makes of those below, at strength 1.

        `keep` is (r), how much each rank counts. Works in the dtype of its arguments and is differentiable.
        """

    @abstractmethod
    def forward(self, p: Params, below: Base, x: Tensor, call: Call) -> Tensor:
        """What the layer gives with this adapter on it, at `call.strength`, equal to the merged weight's output."""

    @classmethod
    @abstractmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        """Settings read off the tensors of a file. `alpha` as stored, None when the file has none."""

    @classmethod
    def uses_alpha(cls, p: Params) -> bool:
        """Whether the alpha beside these tensors in a file changes what they do."""
        return True

    @classmethod
    def claims(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors whose names are all its own, by name as in a file, are in fact its own."""
        return True

    def scale(self, g: Geometry) -> float:
        """What the change to the weight is multiplied by, exactly once, wherever it is used."""
        return 1.0

    def constants(self, g: Geometry) -> tuple[float, ...]:
        """The settings that the formula takes beside the tensors, as numbers, for a layer: the scale and what else.

        With the same constants, tensors of the same names and shapes do the same.
        """
        return (self.scale(g),)

    def complete(self, p: Params, below: Base) -> dict[str, Tensor]:
        """Tensors of a file with those added that it may leave out because the base weight determines them.

        Raises `FileError` where it does not determine them.
        """
        return dict(p)

    def export_tensors(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        """Tensors as they go into a file: trained gates folded into a factor, so that every reader applies them."""
        return dict(p)

    def stored_alpha(self, g: Geometry) -> float | None:
        """The alpha that makes a plain reader, which divides it by the rank, arrive at our scale. None: no alpha."""
        return None

    def grain(self, g: Geometry) -> int:
        """How many consecutive rows of the weight go together: `cut` and `take` split no block of so many."""
        return g.out_features

    def cut(self, g: Geometry, run: Run) -> Algorithm:
        """The settings with which the tensors of `take` do to a layer of these rows alone what this does to them."""
        return self

    def take(self, p: Params, g: Geometry, run: Run) -> dict[str, Tensor]:
        """The tensors for some rows of the weight, exact and differentiable; views of those of all rows, mostly."""
        return dict(p)

    @classmethod
    def join(cls, parts: Sequence[Part], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        """One adapter for a layer whose rows those of several others are, all of this class; other rows get nothing.

        None where no tensors of this algorithm can say that. Exact where it is something.
        """
        return None

    def fit_keep(self, keep: Tensor) -> Tensor:
        """A mask (..., n) over as many ranks as this algorithm has. Only `rank_masked` ones have any."""
        return keep

    @property
    def moves_bias(self) -> bool:
        """Whether it changes the bias of a layer that has one."""
        return False

    @property
    def rank_masked(self) -> bool:
        """Whether a timestep schedule says anything to this algorithm, so that its effect differs from step to step."""
        return False

    @property
    def drops(self) -> bool:
        """Whether training passes draw random numbers. Evaluation never does."""
        return self.module_dropout > 0

    def draw(self, call: Call, x: Tensor) -> Call:
        """The call with this pass's random choices made, by torch's random numbers for the device of `x`."""
        if call.dropping is None or not self.module_dropout:
            return call
        alive = torch.rand((), device=x.device) >= call.dropping * self.module_dropout
        return replace(call, strength=call.strength * alive)

    def max_rank(self, g: Geometry) -> int | None:
        """The highest rank of ΔW as a matrix (O, I·ΠK), for any values of the tensors. None: the weight is none."""
        return min(g.out_features, g.fan_in)

    def building(self, g: Geometry) -> int:
        """Multiplications that building ΔW takes."""
        return g.size

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        """What this adds to a layer's pass over some tokens; by default that of `dense_forward`.

        `alone`: the layer below runs by itself, since it is of low precision, quantised, or has adapters already.
        """
        why = "ΔW is built and applied beside the layer"
        build = self.building(g) / tokens
        return Cost("dense", why, g.size + build, 3 * g.size + 4 * build)

    def waste(self, g: Geometry) -> str | None:
        """Why these settings ask for more than a layer can use, with the nearest that does; None when they do not."""
        return None

    def check(self, g: Geometry) -> None:
        """Raise `ConfigError` when this algorithm cannot serve a layer."""
        if g.kind not in self.kinds:
            told = "norms take Norm()" if g.kind == "norm" else "leave it out, or give it LoRA()"
            raise ConfigError(f"{self.name} serves {', '.join(self.kinds)}, not a {g.kind}; {told}")
        self.slots(g)

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


class Entry(NamedTuple):
    """One algorithm on one layer."""

    algorithm: Algorithm
    geometry: Geometry
    tensors: dict[str, Tensor]
    """By slot name."""


class Part(NamedTuple):
    """An adapter of some consecutive rows of a layer."""

    start: int
    entry: Entry

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.entry.geometry.out_features)


def joined_rows(parts: Sequence[Part], g: Geometry, slot: str, axis: int = 0, fill: float = 0.0) -> Tensor:
    """A slot with something for each row, over all rows of the joined layer: `fill` where there is no part."""
    tensors = [part.entry.tensors[slot] for part in parts]
    first, dtype = tensors[0], common_dtype(tensors)
    whole = first.new_full((*first.shape[:axis], g.out_features, *first.shape[axis + 1 :]), fill, dtype=dtype)
    for part, tensor in zip(parts, tensors, strict=True):
        whole.movedim(axis, 0)[part.rows] = tensor.movedim(axis, 0)
    return whole


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The least that holds what all of them hold."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def covers(parts: Sequence[Part], g: Geometry) -> bool:
    """Whether every row of the joined layer has a part."""
    return sum(part.entry.geometry.out_features for part in parts) == g.out_features


def interpolate(base: Affine, adapted: Affine, strength: Tensor | float) -> Affine:
    """Strength, defined: base + μ(adapted - base), for weight and bias."""
    if adapted.bias is None:
        bias = None
    elif base.bias is None:
        bias = adapted.bias * strength
    else:
        bias = base.bias + strength * (adapted.bias - base.bias)
    return Affine(base.weight + strength * (adapted.weight - base.weight), bias)


def dense_forward(algorithm: Algorithm, p: Params, below: Base, x: Tensor, call: Call) -> Tensor:
    """The definition on activations, for layers where nothing cheaper is exact: below(x) and op(x, μ(V - W)).

    V - W is taken in the adapter's precision and never added to a half-precision W.
    """
    g, base = below.geometry, below.affine()
    wide = base.widen(next(iter(p.values())).dtype)
    whole = algorithm.transform(p, wide, g, None if call.keep is None else one_mask(call.keep))
    y = below(x)
    change = ((whole.weight - wide.weight) * call.strength).to(y.dtype)
    return y + g.op(x, change).to(y.dtype)


def in_dtype_of(x: Tensor, p: Params) -> Params:
    """Tensors in the dtype of the activations. Under autocast the operations convert by themselves."""
    dtype = x.dtype
    for tensor in p.values():
        if tensor.dtype != dtype:
            break
    else:
        return p
    if torch.is_autocast_enabled(x.device.type):
        return p
    return {name: tensor.to(x.dtype) for name, tensor in p.items()}


def apply_dropout(x: Tensor, probability: Tensor) -> Tensor:
    """x with numbers zeroed at random and the others divided by 1 - p. `probability` is a 0-d tensor: in a compiled
    graph training and evaluation differ only by its value.
    """
    kept = torch.rand(x.shape, device=x.device) >= probability
    return x * kept / (1 - probability).to(x.dtype)


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


class Matrix:
    """A weight alone, as what lies below an adapter."""

    def __init__(self, geometry: Geometry, weight: Tensor) -> None:
        self.geometry, self.weight = geometry, weight

    def affine(self) -> Affine:
        return Affine(self.weight, None)

    def bias(self) -> Tensor | None:
        return None

    def plain(self, x: Tensor) -> Affine | None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        raise AttachError("a parameter has no output of its own; its module uses it")

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        return self(x)
