"""Split the adapter of a fused layer, and join those of split layers; all of it is exact.

`share_rows` keeps one adapter for all layers that have rows of it; see `lycoris.algorithms.slices`. `take_rows` gives a
layer an adapter with tensors of its own. An algorithm whose tensors cannot express the result becomes a LoRA of its
factors or a dense difference, and the step says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from lycoris.algorithms import DoRA, conversion, slices
from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Entry
from lycoris.algorithms.ranked import Ranked
from lycoris.algorithms.row_selection import RowBlock
from lycoris.algorithms.slices import Slice
from lycoris.algorithms.tensors import EMPTY
from lycoris.errors import FileError
from lycoris.layers.geometry import Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.rounding import widen


class Step(NamedTuple):
    """An adapter after a split or a join."""

    entry: Entry
    note: str = ""
    """What its algorithm had to become; "" when it stayed the same."""


def take_rows(entry: Entry, rows: slice, where: str, *, dense: bool = True) -> Step:
    """Return the adapter of a range of its layer's rows, with tensors of its own.

    Args:
        where: the layer's name, for errors.
        dense: allow a dense difference where it has fewer elements than a LoRA.

    Raises:
        FileError: the result depends on the base weight.
    """
    return _cut_to(entry, _run(entry, rows), where, dense)


def share_rows(entry: Entry, rows: slice, g: Geometry, where: str, *, dense: bool = True) -> Step:
    """Return the adapter of a range of rows that uses the same tensors as the adapters of the other rows.

    Where no slice can express that, it is what `take_rows` returns.

    Args:
        g: the layer that the rows go to.

    Raises:
        FileError: see `take_rows` and `place_on`.
    """
    return _share_rows(entry, _run(entry, rows), g, where) or _then_on(
        take_rows(entry, rows, where, dense=dense), g, where
    )


def swap_halves(entry: Entry, where: str, *, dense: bool = True) -> Step:
    """Return the adapter with the two halves of its layer's rows exchanged, with tensors of its own.

    Some formats store the shift and the scale of an adaptive norm in the other order. See `take_rows`.
    """
    return _cut_to(entry, _halves(entry), where, dense)


def share_swapped_halves(entry: Entry, where: str, *, dense: bool = True) -> Step:
    """Return the adapter with the two halves of its layer's rows exchanged, with the same tensors where that is
    possible."""
    return _share_rows(entry, _halves(entry), entry.geometry, where) or swap_halves(entry, where, dense=dense)


def separate_slice(entry: Entry, where: str, *, dense: bool = True) -> Step:
    """Return a slice as an adapter with tensors of its own, as `take_rows` does, and any other entry as it is.

    Args:
        where: the layer's name, for errors.
        dense: allow a dense difference.

    Raises:
        FileError: see `take_rows`.
    """
    if not isinstance(entry.algorithm, Slice):
        return Step(entry)
    whole = slices.fused_entry(entry)
    return _then_on(_cut_to(whole, entry.algorithm.rows(entry.geometry), where, dense), entry.geometry, where)


def join_rows(parts: Sequence[RowBlock], g: Geometry, where: str, *, dense: bool = True) -> Step:
    """Return one adapter for a layer that has the rows of several.

    Parts of different dtypes are promoted to one that holds them all, and to at least float32 where values have to be
    multiplied.

    Args:
        parts: in any order; rows that no part has are not changed.
        g: the joined layer.

    Raises:
        FileError: the result depends on the base weight.
    """
    ordered = sorted(parts, key=lambda part: part.start)
    if whole := slices.rejoin(ordered, g):
        return Step(place_on(whole, g, where))
    separate = [part._replace(entry=separate_slice(part.entry, where, dense=dense).entry) for part in ordered]
    parts = [part._replace(entry=_fold_scalar(_computable(part.entry))) for part in separate]
    kinds = {type(part.entry.algorithm) for part in parts}
    if len(kinds) == 1:
        own = kinds.pop().concat_rows(parts, g)
        if own is not None:
            return Step(place_on(Entry(own[0], g, own[1]), g, where))
    plain = [part._replace(entry=_as_lora_or_full(part.entry, "joined with others", where, dense)) for part in parts]
    if any(part.entry.algorithm.name == "full" for part in plain):
        plain = [part._replace(entry=conversion.dense(part.entry)) for part in plain]
    algorithm, tensors = type(plain[0].entry.algorithm).concat_rows(plain, g) or (None, {})
    assert algorithm is not None, "LoRA and Full join whatever there is"
    joined = place_on(Entry(algorithm, g, tensors), g, where)
    return Step(joined, _describe_change([part.entry for part in parts], joined))


def place_on(entry: Entry, g: Geometry, where: str) -> Entry:
    """Return the entry for a layer of the same shape, without a change of the bias where the layer has none.

    Raises:
        FileError: it does change the bias, so that a part of it would be lost.
    """
    biases = set() if g.has_bias else entry.tensors.keys() & EMPTY
    rest = {name: tensor for name, tensor in entry.tensors.items() if name not in biases}
    if biases and (not rest or any(entry.tensors[name].any() for name in biases)):
        raise FileError(f"{where}: its {entry.algorithm.name} changes a bias, and this {g} has none")
    return entry._replace(geometry=g, tensors=rest)


def _computable(entry: Entry) -> Entry:
    """Widen 8-bit tensors, which torch can neither compare nor promote."""
    small = {name for name, t in entry.tensors.items() if t.is_floating_point() and t.itemsize == 1}
    return entry._replace(tensors={name: widen(t) if name in small else t for name, t in entry.tensors.items()})


def _run(entry: Entry, rows: slice) -> RowRange:
    return RowRange(rows.start, rows.stop - rows.start, entry.geometry.out_features)


def _halves(entry: Entry) -> RowRange:
    rows = entry.geometry.out_features
    return RowRange(rows // 2, rows, rows)


def _share_rows(entry: Entry, run: RowRange, g: Geometry, where: str) -> Step | None:
    found = slices.share(entry, run, g)
    if found is None or not isinstance(found.algorithm, Slice):
        return None if found is None else Step(found)
    lost = [] if g.has_bias else [name for name in slices.ROW_BIASES if name in found.tensors]
    if lost:
        # Raises where these rows of the bias say something.
        own = slices.own_rows(found._replace(geometry=replace(g, has_bias=True)))
        place_on(own or found, g, where)
    return Step(found)


def _then_on(step: Step, g: Geometry, where: str) -> Step:
    # A bias may be one that only other parts have.
    return step._replace(entry=place_on(step.entry, g, where))


def _cut_to(entry: Entry, run: RowRange, where: str, dense: bool) -> Step:
    entry, note = _separate_dora(_computable(slices.own_rows(entry) or entry), where, dense)
    algorithm, g, _ = entry
    if run.splits(algorithm.row_block_size(g)):
        few = run.rows < run.total
        what = f"cut to {run.rows} of its {g.out_features} rows" if few else "given its rows in another order"
        plain = _as_lora_or_full(entry, what, where, dense)
        return Step(found := slices.cut_entry(plain, run), note or _describe_change([entry], found))
    if not conversion.has_start(entry):
        raise FileError(
            f"{where}: what its {algorithm.name} started from is left out and follows from the weight of the fused "
            f"layer; without the base model's weights it cannot be cut to {run.rows} of its {g.out_features} rows"
        )
    own = _separate_dora(slices.cut_entry(entry, run), where, dense)
    return own._replace(note=note or own.note)


def _separate_dora(entry: Entry, where: str, dense: bool) -> Step:
    """Return DoRA over a slice as DoRA over an adapter with tensors of its own."""
    algorithm, g, tensors = entry
    if not isinstance(algorithm, DoRA) or not isinstance(algorithm.inner, Slice):
        return Step(entry)
    step = separate_slice(Entry(algorithm.inner, g, _without(tensors, "magnitude")), where, dense=dense)
    inner = step.entry
    assert isinstance(inner.algorithm, Additive)
    own = inner.tensors | {"magnitude": tensors["magnitude"]}
    return Step(Entry(replace(algorithm, inner=inner.algorithm), g, own), step.note)


def _without(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {own: tensor for own, tensor in tensors.items() if own != name}


def _fold_scalar(entry: Entry) -> Entry:
    """Multiply the trained scalar into a factor: the parts of a layer cannot share one."""
    algorithm, g, tensors = entry
    if isinstance(algorithm, DoRA):
        inner = _fold_scalar(Entry(algorithm.inner, g, tensors))
        assert isinstance(inner.algorithm, Additive)
        return Entry(replace(algorithm, inner=inner.algorithm), g, inner.tensors)
    if not isinstance(algorithm, Ranked) or not algorithm.use_scalar:
        return entry
    return Entry(replace(algorithm, use_scalar=False), g, algorithm.export_tensors(tensors, g))


def _as_lora_or_full(entry: Entry, what: str, where: str, dense: bool) -> Entry:
    """Return the same change as LoRA or Full."""
    if conversion.needs_base(entry):
        raise FileError(f"{where}: its {entry.algorithm.name} cannot be {what} without the base model's weights")
    return conversion.low_rank(entry, always=not dense) or conversion.dense(entry)


def _describe_change(before: Sequence[Entry], after: Entry) -> str:
    names = " and ".join(sorted({entry.algorithm.name for entry in before}))
    rank = after.tensors["down"].shape[0] if after.algorithm.name == "lora" else None
    masks = "; timestep masks are lost" if any(entry.algorithm.uses_rank_mask for entry in before) else ""
    return f"{names} became {'a dense difference' if rank is None else f'a LoRA of rank {rank}'}, exact{masks}"
