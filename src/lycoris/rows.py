"""Adapters of some of a layer's rows: what a fused projection's adapter is for queries alone, and back.

Every step says whether the algorithm stayed what it was. One that cannot say it in its own tensors becomes a LoRA of
its factors or a dense difference, both exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lycoris import recast
from lycoris.additive import Additive, Ranked
from lycoris.algorithm import Entry, Part
from lycoris.algorithms import EMPTY, DoRA
from lycoris.errors import FileError
from lycoris.geometry import Geometry
from lycoris.ops.rounding import widened


class Step(NamedTuple):
    """An adapter in its new form."""

    entry: Entry
    note: str = ""
    """What it had to become for that; "" when its algorithm could say it."""


def take(entry: Entry, rows: slice, where: str, *, dense: bool = True) -> Step:
    """What an adapter does to a range of its layer's rows. Raises `FileError` where only the base weight tells.

    Here and below, `dense` allows a dense difference where that holds fewer numbers than a LoRA.
    """
    return _at(_computable(entry), torch.arange(rows.start, rows.stop), where, dense)


def swapped(entry: Entry, where: str, *, dense: bool = True) -> Step:
    """An adapter with the two halves of its layer's rows exchanged."""
    half = entry.geometry.out_features // 2
    return _at(_computable(entry), torch.arange(2 * half).roll(half), where, dense)


def join(parts: Sequence[Part], g: Geometry, where: str, *, dense: bool = True) -> Step:
    """One adapter for a layer whose rows are those of several. Raises `FileError` where only the base weight tells.

    Parts of different precision become what holds them all, and where numbers have to be multiplied at least float32.
    """
    ordered = sorted(parts, key=lambda part: part.start)
    parts = [part._replace(entry=_folded(_computable(part.entry))) for part in ordered]
    kinds = {type(part.entry.algorithm) for part in parts}
    if len(kinds) == 1:
        own = kinds.pop().join(parts, g)
        if own is not None:
            return Step(on(Entry(own[0], g, own[1]), g, where))
    plain = [part._replace(entry=_plain(part.entry, "joined with others", where, dense)) for part in parts]
    if any(part.entry.algorithm.name == "full" for part in plain):
        plain = [part._replace(entry=recast.dense(part.entry)) for part in plain]
    algorithm, tensors = type(plain[0].entry.algorithm).join(plain, g) or (None, {})
    assert algorithm is not None, "LoRA and Full join whatever there is"
    joined = on(Entry(algorithm, g, tensors), g, where)
    return Step(joined, _told([part.entry for part in parts], joined))


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
    return entry._replace(tensors={name: widened(t) if name in small else t for name, t in entry.tensors.items()})


def _at(entry: Entry, rows: torch.Tensor, where: str, dense: bool) -> Step:
    algorithm, g, tensors = entry
    part = replace(g, shape=(len(rows), *g.shape[1:]))
    own = algorithm.take(tensors, g, rows)
    if own is not None:
        return Step(Entry(own[0], part, own[1]))
    plain = _plain(entry, f"cut to {len(rows)} of its {g.out_features} rows", where, dense)
    cut = plain.algorithm.take(plain.tensors, g, rows)
    assert cut is not None, "LoRA and Full can be cut anywhere"
    found = Entry(cut[0], part, cut[1])
    return Step(found, _told([entry], found))


def _folded(entry: Entry) -> Entry:
    """Without a gate of its own, which parts of a layer could not share."""
    algorithm, g, tensors = entry
    if isinstance(algorithm, DoRA):
        inner = _folded(Entry(algorithm.over, g, tensors))
        assert isinstance(inner.algorithm, Additive)
        return Entry(replace(algorithm, over=inner.algorithm), g, inner.tensors)
    if not isinstance(algorithm, Ranked) or not algorithm.gate:
        return entry
    return Entry(replace(algorithm, gate=False), g, algorithm.stored(tensors, g))


def _plain(entry: Entry, what: str, where: str, dense: bool) -> Entry:
    """The same as LoRA or Full."""
    if recast.needs_base(entry):
        raise FileError(f"{where}: its {entry.algorithm.name} cannot be {what} without the base model's weights")
    return recast.low_rank(entry, always=not dense) or recast.dense(entry)


def _told(before: Sequence[Entry], after: Entry) -> str:
    names = " and ".join(sorted({entry.algorithm.name for entry in before}))
    rank = after.tensors["down"].shape[0] if after.algorithm.name == "lora" else None
    masks = "; timestep masks are lost" if any(entry.algorithm.rank_masked for entry in before) else ""
    return f"{names} became {'a dense difference' if rank is None else f'a LoRA of rank {rank}'}, exact{masks}"
