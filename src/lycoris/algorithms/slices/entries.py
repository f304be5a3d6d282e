"""Slices as entries: an adapter becomes those of several layers, each an adapter of its own, and one again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lycoris.algorithms.base import Entry
from lycoris.algorithms.row_selection import RowBlock
from lycoris.algorithms.slices.slice import ROW_BIASES, Slice
from lycoris.algorithms.slots import Params
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.equality import same


def share(entry: Entry, run: RowRange, g: Geometry) -> Entry | None:
    """Return the slice of an adapter, or of a slice, for a layer that has some of its rows.

    The tensors are the same objects. All rows in their order give the adapter itself.

    Returns:
        None where no slice can express it, or where some tensors are left out.
    """
    algorithm, fused, tensors = fused_entry(entry)
    part: RowRange | None = run
    if isinstance(entry.algorithm, Slice):
        part = entry.algorithm.rows(entry.geometry).part(run)
    if part is None or tensors.keys() < algorithm.slots(fused).keys():
        return None
    if part.everything:
        return Entry(algorithm, replace(g, has_bias=fused.has_bias), tensors)
    own = Slice.of(algorithm, part, fused.has_bias)
    try:
        own.check(g)
    except ConfigError:
        return None
    return Entry(own, g, tensors)


def fused_entry(entry: Entry) -> Entry:
    """Return the adapter that an entry is a slice of, and any other entry as it is.

    It has the same tensors, and the geometry of the fused layer.
    """
    own, g, tensors = entry
    return Entry(own.inner, own.fused_geometry(g), tensors) if isinstance(own, Slice) else entry


def own_rows(entry: Entry) -> Entry | None:
    """Return a slice as an adapter with tensors of its own; None where its rows alone are no adapter.

    Any other entry is returned as it is. A change of the bias is dropped where the layer has none.
    """
    own, g, _ = entry
    if not isinstance(own, Slice):
        return entry
    if not own.is_own(g):
        return None
    cut = cut_entry(fused_entry(entry), own.rows(g))
    lost = () if g.has_bias else ROW_BIASES
    return Entry(cut.algorithm, g, {name: tensor for name, tensor in cut.tensors.items() if name not in lost})


def cut_entry(entry: Entry, run: RowRange) -> Entry:
    """Return the adapter of some rows, with copies of the tensors that follow the rows.

    Tensors that do not are shared. On a stack, the rows are those of each matrix.

    Args:
        run: the rows, which must not split a block of `row_block_size`.
    """
    algorithm, g, p = entry

    def take(one: Params) -> dict[str, Tensor]:
        return algorithm.select_rows(one, replace(g, stack=0), run)

    given = {id(tensor) for tensor in p.values()}
    taken = torch.func.vmap(take)(dict(p)) if g.stack else take(p)
    own = {name: tensor if id(tensor) in given else tensor.clone() for name, tensor in taken.items()}
    return Entry(algorithm.restrict_to_rows(g, run), replace(g, shape=(run.rows, *g.shape[1:])), own)


def rejoin(parts: Sequence[RowBlock], g: Geometry) -> Entry | None:
    """Return the adapter whose slices these parts are, complete and in order; None where they are not.

    Args:
        parts: at least one, each with its first row in the fused layer.
        g: the fused layer.
    """
    first = parts[0].entry
    if not all(_continues(part, first, g) for part in parts):
        return None
    if sum(part.entry.geometry.out_features for part in parts) != g.out_features:
        return None
    return fused_entry(first)


def _continues(part: RowBlock, first: Entry, g: Geometry) -> bool:
    """Whether a part is the slice at its place of the adapter that another one is a slice of."""
    own, other = part.entry.algorithm, first.algorithm
    if not isinstance(own, Slice) or not isinstance(other, Slice):
        return False
    place = RowRange(part.start, part.entry.geometry.out_features, g.out_features)
    alike = own.inner == other.inner and own.bias == other.bias and own.rows(part.entry.geometry) == place
    return alike and same(part.entry.tensors, first.tensors)
