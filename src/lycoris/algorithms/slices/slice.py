"""Slices: an adapter of a fused layer on the layers that have its rows.

A file may have one adapter for a fused projection where a model has a layer each for queries, keys and values. Each
of them then gets a slice: the tensors of the fused layer's adapter, shared by all slices, and which rows are its own.
A slice computes these rows alone, factored; gradients of all slices add up in the shared tensors, and what is written
back is the one adapter.

Legend: see `lycoris.algorithms.base`; F is the geometry of the fused layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.call import Call
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError, FileError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange

ROW_BIASES = ("diff_b",)
"""Slots with a number for each row's bias, which some of the layers may not have."""


@dataclass(frozen=True, kw_only=True)
class Slice(Algorithm):
    """V = rows `start` to `start + O` of what `inner` makes of a fused layer with O + `others` rows.

    After the last row comes the first again, so that a slice can also be all rows with their halves exchanged. Dropout
    and masks are those of `inner`, drawn by each layer for itself.
    """

    inner: Algorithm
    """The algorithm on the fused layer."""
    start: int = 0
    """The fused layer's row that is the first one here."""
    others: int = 0
    """Rows of the fused layer that are none of this layer's."""
    bias: bool | None = None
    """Whether the fused layer has a bias; None: as this layer."""

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Algorithm) or isinstance(self.inner, Slice):
            raise ConfigError(f"a slice is of the rows of an algorithm such as LoKr(), not of {self.inner!r}")
        object.__setattr__(self, "module_dropout", self.inner.module_dropout)
        super().__post_init__()
        if self.start < 0 or self.others < 0:
            raise ConfigError(f"start and others of a slice count rows from 0, not {self.start} and {self.others}")

    @classmethod
    def of(cls, over: Algorithm, run: RowRange, bias: bool | None = None) -> Slice:
        """Return the slice with these rows, an `AdditiveSlice` where the algorithm is additive.

        Args:
            bias: whether the fused layer has one; None: as the layer of the slice.
        """
        start, others = run.start, run.total - run.rows
        if isinstance(over, Additive):
            return AdditiveSlice(inner=over, start=start, others=others, bias=bias)
        return Slice(inner=over, start=start, others=others, bias=bias)

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the algorithm, which is what a file calls it."""
        return self.inner.name

    @property
    def tensor_names(self) -> Mapping[str, str]:  # type: ignore[override]  # a class attribute elsewhere
        return self.inner.tensor_names

    def fused_geometry(self, g: Geometry) -> Geometry:
        """Return F, the geometry of the fused layer, for a layer that has the slice.

        It is that of the layer with `others` more rows.
        """
        bias = g.has_bias if self.bias is None else self.bias
        return replace(g, shape=(g.out_features + self.others, *g.shape[1:]), has_bias=bias)

    def rows(self, g: Geometry) -> RowRange:
        """Which rows of the fused layer a layer has."""
        return RowRange(self.start, g.out_features, g.out_features + self.others)

    def is_own(self, g: Geometry) -> bool:
        """Return whether the rows are an adapter of the same algorithm by themselves.

        They are if they split no block of the inner algorithm's `row_block_size`.
        """
        return _find_form(self, g).is_own

    def check(self, g: Geometry) -> None:
        super().check(g)
        self.inner.check(self.fused_geometry(g))
        if g.kind == "conv" and g.groups > 1:
            raise ConfigError(f"a slice of a convolution needs all of its input, and this one has {g.groups} groups")
        if self.start >= self.rows(g).total:
            raise ConfigError(f"row {self.start} of a slice is beyond the {self.rows(g).total} of the fused layer")
        if self.others and not isinstance(self, Additive) and not self.is_own(g):
            grain = self.inner.row_block_size(self.fused_geometry(g))
            raise ConfigError(
                f"rows {self.start} to {self.start + g.out_features} split a block of {grain} rows, which "
                f"{self.inner.name} mixes with each other"
            )

    def slots(self, g: Geometry) -> dict[str, Slot]:
        return self.inner.slots(self.fused_geometry(g))

    def initialize(self, p: Params, below: LayerBelow) -> None:
        self.inner.initialize(p, _Fused(self, below))
        if self.is_own(below.geometry) and not self.rows(below.geometry).wraps:
            # Once more through views: what follows from the weight is then, to the last bit, what a pass computes.
            cut, own = self.own(p, below.geometry)
            cut.initialize(own, below)

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        if self.is_own(g):
            cut, own = self.own(p, g)
            return cut.transform(own, base, g, rank_mask)
        back = _back(self.rows(g))
        there = Affine(back.of(base.weight), None if base.bias is None else back.of(base.bias))
        weight, bias = self.inner.transform(p, there, self.fused_geometry(g), rank_mask)
        return Affine(self.rows(g).of(weight), None if bias is None else self.rows(g).of(bias))

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        g = below.geometry
        form = _find_form(self, g)
        if form.is_own:
            return form.algorithm.forward(self._own(p, g, form), below, x, call)
        return self.rows(g).of(self.inner.forward(p, _Unrolled(below, _back(self.rows(g))), x, call), g.channel_axis)

    def own(self, p: Params, g: Geometry) -> tuple[Algorithm, dict[str, Tensor]]:
        """Return algorithm and tensors of the rows by themselves, where that `is_own`.

        The tensors are mostly views of the shared ones.
        """
        form = _find_form(self, g)
        return form.algorithm, self._own(p, g, form)

    def _own(self, p: Params, g: Geometry, form: _Form) -> dict[str, Tensor]:
        own = self.inner.select_rows(p, form.fused, form.run)
        return own if g.has_bias else {name: tensor for name, tensor in own.items() if name not in ROW_BIASES}

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        raise ConfigError("tensors do not tell of which rows they are a slice")

    def fill_missing(self, p: Params, below: LayerBelow) -> dict[str, Tensor]:
        # Another tensor that is not there is one of another setting, which is refused by those who ask for it.
        if any(name not in p and slot.role == "frozen" for name, slot in self.slots(below.geometry).items()):
            raise FileError(
                f"the file leaves out what its {self.name} started from, which follows from the weight of the fused "
                "layer, and this one has some of its rows"
            )
        return dict(p)

    def scale(self, g: Geometry) -> float:
        return self.inner.scale(self.fused_geometry(g))

    def constants(self, g: Geometry) -> tuple[float, ...]:
        return (*self.inner.constants(self.fused_geometry(g)), self.start, self.others)

    def export_alpha(self, g: Geometry) -> float | None:
        return self.inner.export_alpha(self.fused_geometry(g))

    def fit_rank_mask(self, rank_mask: Tensor) -> Tensor:
        return self.inner.fit_rank_mask(rank_mask)

    @property
    def changes_bias(self) -> bool:
        return self.inner.changes_bias

    @property
    def uses_rank_mask(self) -> bool:
        return self.inner.uses_rank_mask

    @property
    def has_dropout(self) -> bool:
        return self.inner.has_dropout

    def sample_dropout(self, call: Call, x: Tensor) -> Call:
        return self.inner.sample_dropout(call, x)

    def max_rank(self, g: Geometry) -> int | None:
        most = self.inner.max_rank(self.fused_geometry(g))
        return None if most is None else min(most, g.out_features, g.fan_in)

    def delta_macs(self, g: Geometry) -> int:
        return _find_form(self, g).algorithm.delta_macs(g)

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        return _find_form(self, g).algorithm.cost(g, tokens, alone=alone)

    def __str__(self) -> str:
        return f"{self.inner}, rows from {self.start} on of a fused layer"


@dataclass(frozen=True, kw_only=True)
class AdditiveSlice(Slice, Additive):
    """A slice of an algorithm that adds a change.

    Where its rows split a block that the algorithm cannot, such as one row of the first factor of a LoKr stands for, it
    computes the least whole blocks around them and leaves the rest.
    """

    inner: Additive

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dropout", self.inner.dropout)

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        if self.is_own(g):
            return Slice.transform(self, p, base, g, rank_mask)
        return Additive.transform(self, p, base, g, rank_mask)

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        if self.is_own(below.geometry):
            return Slice.forward(self, p, below, x, call)
        return Additive.forward(self, p, below, x, call)

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        return (Slice if self.is_own(g) else Additive).cost(self, g, tokens, alone=alone)

    def delta(self, p: Params, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        over, around, inside = self._around(g)
        weight, bias = over.delta(self._take_rows(p, g), around, rank_mask)
        return Affine(inside.of(weight), None if bias is None or not g.has_bias else inside.of(bias))

    def low_rank_factors(self, p: Params, g: Geometry) -> tuple[Tensor, Tensor] | None:
        over, around, inside = self._around(g)
        pair = over.low_rank_factors(self._take_rows(p, g), around)
        return None if pair is None else (inside.of(pair[0]), pair[1])

    def gram_terms(self, p: Params, weight: Tensor, g: Geometry, axis: int) -> tuple[Tensor, Tensor] | None:
        over, around, inside = self._around(g)
        if axis != 0 and inside.rows < inside.total:
            return None  # the squares of the rows around would be among those of a column
        gram = over.gram_terms(self._take_rows(p, g), inside.spread(weight), around, axis)
        if gram is None or axis != 0:
            return gram
        return inside.of(gram[0]), inside.of(gram[1])

    def product_macs(self, g: Geometry) -> int | None:
        over, around, _ = self._around(g)
        return over.product_macs(around)

    def delta_macs(self, g: Geometry) -> int:
        over, around, _ = self._around(g)
        return over.delta_macs(around)

    def saved_elements(self, g: Geometry) -> int:
        over, around, _ = self._around(g)
        return over.saved_elements(around)

    def add_product(self, y: Tensor, p: Params, g: Geometry, x: Tensor, gain: Tensor | float, call: Call) -> Tensor:
        over, around, inside = self._around(g)
        shape = list(y.shape)
        shape[g.channel_axis] = around.out_features
        added = over.add_product(y.new_zeros(shape), self._take_rows(p, g), around, x, gain, call)
        return y + inside.of(added, g.channel_axis)

    def mask_ranks(self, p: Params, g: Geometry, rank_mask: Tensor | None) -> Params:
        return self.inner.mask_ranks(p, self.fused_geometry(g), rank_mask)

    def delta_bias(self, p: Params) -> Tensor | None:
        return None  # a change of the bias is in rows, which can always be cut

    def read_scalar(self, p: Params) -> Tensor | float:
        return self.inner.read_scalar(p)

    def _around(self, g: Geometry) -> tuple[Additive, Geometry, RowRange]:
        """What computes the rows around, the layer of these, and where the slice is among them."""
        form = _find_form(self, g)
        assert isinstance(form.algorithm, Additive)
        return form.algorithm, form.geometry, form.inside

    def _take_rows(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        """The tensors of the rows around."""
        form = _find_form(self, g)
        return self.inner.select_rows(p, form.fused, form.outer)


class _Form(NamedTuple):
    """What a slice is on a layer."""

    fused: Geometry
    run: RowRange
    """Its rows."""
    outer: RowRange
    """The least rows around them that split no block; the same where they split none."""
    is_own: bool
    """Whether these are its rows and no others."""
    inside: RowRange
    """Where its rows are among those."""
    algorithm: Algorithm
    """The settings for those rows."""
    geometry: Geometry
    """A layer of those rows."""


@lru_cache(maxsize=4096)
def _known_form(own: Slice, g: Geometry) -> _Form:
    fused, run = own.fused_geometry(g), own.rows(g)
    outer = run.around(own.inner.row_block_size(fused))
    shape = (outer.rows, *fused.shape[1:])
    cut = own.inner.restrict_to_rows(fused, outer)
    return _Form(fused, run, outer, outer == run, run.inside(outer), cut, replace(fused, shape=shape))


def _find_form(own: Slice, g: Geometry) -> _Form:
    # Every pass asks for it; a compiler looks at what is computed, not at what is remembered.
    return (_known_form.__wrapped__ if torch.compiler.is_compiling() else _known_form)(own, g)


class _Fused:
    """A fused layer of which only the rows of a slice are known, as what lies below its adapter; others are zero."""

    def __init__(self, own: Slice, below: LayerBelow) -> None:
        self.order, self.below, self.geometry = own.rows(below.geometry), below, own.fused_geometry(below.geometry)

    def affine(self) -> Affine:
        weight, bias = self.below.affine()
        return Affine(self.order.spread(weight), None if bias is None else self.order.spread(bias))

    def bias(self) -> Tensor | None:
        return self.affine().bias

    def plain(self, x: Tensor) -> Affine | None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, self.affine())

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        return self.geometry.op(x, *affine)


class _Unrolled:
    """A layer with its rows in the order of the fused layer."""

    def __init__(self, below: LayerBelow, order: RowRange) -> None:
        self.below, self.order, self.geometry = below, order, below.geometry

    def __call__(self, x: Tensor) -> Tensor:
        return self.order.of(self.below(x), self.geometry.channel_axis)

    def affine(self) -> Affine:
        weight, bias = self.below.affine()
        return Affine(self.order.of(weight), None if bias is None else self.order.of(bias))

    def bias(self) -> Tensor | None:
        bias = self.below.bias()
        return None if bias is None else self.order.of(bias)

    def plain(self, x: Tensor) -> Affine | None:
        return None

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        return self.geometry.op(x, *affine)


def _back(run: RowRange) -> RowRange:
    """What undoes an order of all rows."""
    return RowRange(run.total - run.start if run.start else 0, run.rows, run.total)


def cut_additive(over: Additive, g: Geometry, run: RowRange) -> Additive:
    """The settings for some rows, whatever block they split."""
    cut = Slice.of(over, run, g.has_bias) if run.splits(over.row_block_size(g)) else over.restrict_to_rows(g, run)
    assert isinstance(cut, Additive)
    return cut


def take_additive(over: Additive, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
    """The tensors for `cut_additive`."""
    return dict(p) if run.splits(over.row_block_size(g)) else over.select_rows(p, g, run)
