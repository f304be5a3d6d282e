"""Slices as entries: an adapter becomes those of several layers, each an adapter of its own, and one again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lycoris.algorithms.base import Entry
from lycoris.algorithms.row_selection import Part
from lycoris.algorithms.slices.slice import BIASES, Slice
from lycoris.algorithms.slots import Params
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Geometry
from lycoris.ops.blocks import Run
from lycoris.ops.equality import same


def share(entry: Entry, run: Run, g: Geometry) -> Entry | None:
    """The slice of an adapter, or of a slice, on a layer that has some of its rows; the tensors are the same objects.

    An entry of all rows in their order is the adapter itself. None where no slice can say it, or where some tensors
    are left out.
    """
    algorithm, fused, tensors = fused_entry(entry)
    part: Run | None = run
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
    """The adapter that an entry is a slice of; every other entry itself."""
    own, g, tensors = entry
    return Entry(own.inner, own.fused_geometry(g), tensors) if isinstance(own, Slice) else entry


def own_rows(entry: Entry) -> Entry | None:
    """A slice as an adapter of its own, with tensors of its own; None where its rows are none by themselves."""
    own, g, _ = entry
    if not isinstance(own, Slice):
        return entry
    if not own.is_own(g):
        return None
    cut = cut_entry(fused_entry(entry), own.rows(g))
    lost = () if g.has_bias else BIASES
    return Entry(cut.algorithm, g, {name: tensor for name, tensor in cut.tensors.items() if name not in lost})


def cut_entry(entry: Entry, run: Run) -> Entry:
    """Some rows of an adapter that split no block of its `grain`, with tensors of their own where they are others."""
    algorithm, g, p = entry

    def take(one: Params) -> dict[str, Tensor]:
        return algorithm.select_rows(one, replace(g, stack=0), run)

    given = {id(tensor) for tensor in p.values()}
    taken = torch.func.vmap(take)(dict(p)) if g.stack else take(p)
    own = {name: tensor if id(tensor) in given else tensor.clone() for name, tensor in taken.items()}
    return Entry(algorithm.restrict_to_rows(g, run), replace(g, shape=(run.rows, *g.shape[1:])), own)


def rejoin(parts: Sequence[Part], g: Geometry) -> Entry | None:
    """The adapter that some slices are all of, in the order of its rows; None where they are not."""
    first = parts[0].entry
    if not all(_continues(part, first, g) for part in parts):
        return None
    if sum(part.entry.geometry.out_features for part in parts) != g.out_features:
        return None
    return fused_entry(first)


def _continues(part: Part, first: Entry, g: Geometry) -> bool:
    """Whether a part is the slice at its place of the adapter that another one is a slice of."""
    own, other = part.entry.algorithm, first.algorithm
    if not isinstance(own, Slice) or not isinstance(other, Slice):
        return False
    place = Run(part.start, part.entry.geometry.out_features, g.out_features)
    alike = own.inner == other.inner and own.bias == other.bias and own.rows(part.entry.geometry) == place
    return alike and same(part.entry.tensors, first.tensors)
