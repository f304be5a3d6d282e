"""Adapters of some of a layer's rows: what a fused projection's adapter is for queries alone, and back.

Every step says whether the algorithm stayed what it was. `share` keeps the one adapter for all layers that have its
rows; see `lycoris.algorithms.slices`. `take` gives a layer an adapter of its own; one that cannot say it in its own
tensors becomes a LoRA of its factors or a dense difference, both exact.
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
from lycoris.algorithms.row_selection import Part
from lycoris.algorithms.slices import Slice
from lycoris.algorithms.tensors import EMPTY
from lycoris.errors import FileError
from lycoris.layers.geometry import Geometry
from lycoris.ops.blocks import Run
from lycoris.ops.rounding import widen


class Step(NamedTuple):
    """An adapter in its new form."""

    entry: Entry
    note: str = ""
    """What it had to become for that; "" when its algorithm could say it."""


def take(entry: Entry, rows: slice, where: str, *, dense: bool = True) -> Step:
    """What an adapter does to a range of its layer's rows. Raises `FileError` where only the base weight tells.

    Here and below, `dense` allows a dense difference where that holds fewer numbers than a LoRA.
    """
    return _at(entry, _run(entry, rows), where, dense)


def share(entry: Entry, rows: slice, g: Geometry, where: str, *, dense: bool = True) -> Step:
    """The same by the adapter's own tensors, shared with the layers that have its other rows, on a layer of that shape.

    Where no slice can say it: as `take` does. Raises `FileError` as `take` and `on` do.
    """
    return _share_rows(entry, _run(entry, rows), g, where) or _then_on(take(entry, rows, where, dense=dense), g, where)


def swap_halves(entry: Entry, where: str, *, dense: bool = True) -> Step:
    """An adapter with the two halves of its layer's rows exchanged."""
    return _at(entry, _halves(entry), where, dense)


def share_swapped(entry: Entry, where: str, *, dense: bool = True) -> Step:
    """The same by the adapter's own tensors, as `share` does it."""
    return _share_rows(entry, _halves(entry), entry.geometry, where) or swap_halves(entry, where, dense=dense)


def apart(entry: Entry, where: str, *, dense: bool = True) -> Step:
    """A slice as an adapter of its layer's own, as `take` gives it; every other entry as it is."""
    if not isinstance(entry.algorithm, Slice):
        return Step(entry)
    whole = slices.fused_entry(entry)
    return _then_on(_at(whole, entry.algorithm.rows(entry.geometry), where, dense), entry.geometry, where)


def join(parts: Sequence[Part], g: Geometry, where: str, *, dense: bool = True) -> Step:
    """One adapter for a layer whose rows are those of several. Raises `FileError` where only the base weight tells.

    Parts of different precision become what holds them all, and where numbers have to be multiplied at least float32.
    """
    ordered = sorted(parts, key=lambda part: part.start)
    if whole := slices.rejoin(ordered, g):
        return Step(on(whole, g, where))
    separate = [part._replace(entry=apart(part.entry, where, dense=dense).entry) for part in ordered]
    parts = [part._replace(entry=_fold_scalar(_computable(part.entry))) for part in separate]
    kinds = {type(part.entry.algorithm) for part in parts}
    if len(kinds) == 1:
        own = kinds.pop().concat_rows(parts, g)
        if own is not None:
            return Step(on(Entry(own[0], g, own[1]), g, where))
    plain = [part._replace(entry=_plain(part.entry, "joined with others", where, dense)) for part in parts]
    if any(part.entry.algorithm.name == "full" for part in plain):
        plain = [part._replace(entry=conversion.dense(part.entry)) for part in plain]
    algorithm, tensors = type(plain[0].entry.algorithm).concat_rows(plain, g) or (None, {})
    assert algorithm is not None, "LoRA and Full join whatever there is"
    joined = on(Entry(algorithm, g, tensors), g, where)
    return Step(joined, _describe_change([part.entry for part in parts], joined))


def on(entry: Entry, g: Geometry, where: str) -> Entry:
    """The entry on a layer of its shape, which may have no bias.

    Raises `FileError` where it changes one: half of what it does would be lost.
    """
    biases = set() if g.has_bias else entry.tensors.keys() & EMPTY
    rest = {name: tensor for name, tensor in entry.tensors.items() if name not in biases}
    if biases and (not rest or any(entry.tensors[name].any() for name in biases)):
        raise FileError(f"{where}: its {entry.algorithm.name} changes a bias, and this {g} has none")
    return entry._replace(geometry=g, tensors=rest)


def _computable(entry: Entry) -> Entry:
    """With tensors of eight bits widened: torch compares and promotes none of them."""
    small = {name for name, t in entry.tensors.items() if t.is_floating_point() and t.itemsize == 1}
    return entry._replace(tensors={name: widen(t) if name in small else t for name, t in entry.tensors.items()})


def _run(entry: Entry, rows: slice) -> Run:
    return Run(rows.start, rows.stop - rows.start, entry.geometry.out_features)


def _halves(entry: Entry) -> Run:
    rows = entry.geometry.out_features
    return Run(rows // 2, rows, rows)


def _share_rows(entry: Entry, run: Run, g: Geometry, where: str) -> Step | None:
    found = slices.share(entry, run, g)
    if found is None or not isinstance(found.algorithm, Slice):
        return None if found is None else Step(found)
    lost = [] if g.has_bias else [name for name in slices.BIASES if name in found.tensors]
    if lost:
        # Raises where these rows of the bias say something.
        own = slices.own_rows(found._replace(geometry=replace(g, has_bias=True)))
        on(own or found, g, where)
    return Step(found)


def _then_on(step: Step, g: Geometry, where: str) -> Step:
    # A bias may be one that only other parts have.
    return step._replace(entry=on(step.entry, g, where))


def _at(entry: Entry, run: Run, where: str, dense: bool) -> Step:
    entry, told = _separate(_computable(slices.own_rows(entry) or entry), where, dense)
    algorithm, g, _ = entry
    if run.splits(algorithm.row_block_size(g)):
        few = run.rows < run.total
        what = f"cut to {run.rows} of its {g.out_features} rows" if few else "given its rows in another order"
        plain = _plain(entry, what, where, dense)
        return Step(found := slices.cut_entry(plain, run), told or _describe_change([entry], found))
    if not conversion.has_start(entry):
        raise FileError(
            f"{where}: what its {algorithm.name} started from is left out and follows from the weight of the fused "
            f"layer; without the base model's weights it cannot be cut to {run.rows} of its {g.out_features} rows"
        )
    own = _separate(slices.cut_entry(entry, run), where, dense)
    return own._replace(note=told or own.note)


def _separate(entry: Entry, where: str, dense: bool) -> Step:
    """DoRA over a slice as DoRA over an adapter of the layer's own."""
    algorithm, g, tensors = entry
    if not isinstance(algorithm, DoRA) or not isinstance(algorithm.inner, Slice):
        return Step(entry)
    step = apart(Entry(algorithm.inner, g, _without(tensors, "magnitude")), where, dense=dense)
    inner = step.entry
    assert isinstance(inner.algorithm, Additive)
    own = inner.tensors | {"magnitude": tensors["magnitude"]}
    return Step(Entry(replace(algorithm, inner=inner.algorithm), g, own), step.note)


def _without(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {own: tensor for own, tensor in tensors.items() if own != name}


def _fold_scalar(entry: Entry) -> Entry:
    """Without a scalar of its own, which parts of a layer could not share."""
    algorithm, g, tensors = entry
    if isinstance(algorithm, DoRA):
        inner = _fold_scalar(Entry(algorithm.inner, g, tensors))
        assert isinstance(inner.algorithm, Additive)
        return Entry(replace(algorithm, inner=inner.algorithm), g, inner.tensors)
    if not isinstance(algorithm, Ranked) or not algorithm.use_scalar:
        return entry
    return Entry(replace(algorithm, use_scalar=False), g, algorithm.export_tensors(tensors, g))


def _plain(entry: Entry, what: str, where: str, dense: bool) -> Entry:
    """The same as LoRA or Full."""
    if conversion.needs_base(entry):
        raise FileError(f"{where}: its {entry.algorithm.name} cannot be {what} without the base model's weights")
    return conversion.low_rank(entry, always=not dense) or conversion.dense(entry)


def _describe_change(before: Sequence[Entry], after: Entry) -> str:
    names = " and ".join(sorted({entry.algorithm.name for entry in before}))
    rank = after.tensors["down"].shape[0] if after.algorithm.name == "lora" else None
    masks = "; timestep masks are lost" if any(entry.algorithm.uses_rank_mask for entry in before) else ""
    return f"{names} became {'a dense difference' if rank is None else f'a LoRA of rank {rank}'}, exact{masks}"
