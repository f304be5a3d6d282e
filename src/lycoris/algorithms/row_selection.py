"""Adapters of some of a layer's rows, and of a layer whose rows come from several.

Files disagree about fused projections: one has an adapter for q, k and v together, another has three. An algorithm that
says here how its tensors follow the rows of the weight converts exactly and stays what it is. Every other one becomes a
LoRA of its factors or a dense difference, which is exact too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.slots import Params
from lycoris.layers.geometry import Geometry
from lycoris.ops.blocks import RowRange

if TYPE_CHECKING:
    from lycoris.algorithms.base import Algorithm, Entry


class RowBlock(NamedTuple):
    """An adapter of some consecutive rows of a layer.

    The geometry of its entry is that of these rows alone.
    """

    start: int
    """First of its rows."""
    entry: Entry

    @property
    def rows(self) -> slice:
        """Its rows among those of the layer."""
        return slice(self.start, self.start + self.entry.geometry.out_features)


class RowHooks:
    """How an algorithm's tensors follow the rows of the weight. By default all rows belong together.

    `restrict_to_rows` and `select_rows` get only rows that split no block of `row_block_size`.
    """

    def row_block_size(self, g: Geometry) -> int:
        """Return how many consecutive rows belong together: other methods never have to split a block of so many.

        1 where every row can stand alone. The default is all rows.
        """
        return g.out_features

    def restrict_to_rows(self, g: Geometry, run: RowRange) -> Self:
        """Return the settings under which the tensors of `select_rows` do to these rows what this does to them.

        Args:
            g: the layer with all rows.
            run: the rows, which split no block of `row_block_size`.
        """
        return self

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        """Return the tensors of some rows, exact and differentiable; mostly views of those of all rows.

        Tensors that do not follow the rows are returned as they are, shared. Arguments are those of `restrict_to_rows`.
        """
        return dict(p)

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        """Return one exact adapter for a layer that has the rows of all parts; rows without a part are not changed.

        All parts are of this class. None where no tensors of this algorithm can express that.
        """
        return None


def joined_rows(parts: Sequence[RowBlock], g: Geometry, slot: str, axis: int = 0, fill: float = 0.0) -> Tensor:
    """Return a slot that has an entry per row, over all rows of the joined layer.

    A new tensor, in the narrowest dtype that holds the values of all parts.

    Args:
        slot: the slot's name, which all parts have.
        axis: the axis of the slot that has the rows.
        fill: the value of rows without a part.
    """
    tensors = [part.entry.tensors[slot] for part in parts]
    first, dtype = tensors[0], common_dtype(tensors)
    whole = first.new_full((*first.shape[:axis], g.out_features, *first.shape[axis + 1 :]), fill, dtype=dtype)
    for part, tensor in zip(parts, tensors, strict=True):
        whole.movedim(axis, 0)[part.rows] = tensor.movedim(axis, 0)
    return whole


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the narrowest dtype that holds the values of all tensors, as torch promotes them.

    There must be at least one, and float8 promotes only with itself.
    """
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def covers(parts: Sequence[RowBlock], g: Geometry) -> bool:
    """Tell whether every row of the joined layer has a part.

    Rows are counted, so parts must not overlap.
    """
    return sum(part.entry.geometry.out_features for part in parts) == g.out_features
