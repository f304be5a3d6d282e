"""Adapters of some rows of a layer: cut, with halves exchanged, joined; always the same change of the weight."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cases import ALGORITHMS, relative
from torch import Tensor

from lycoris import LoKr, LoRA, recast, rows
from lycoris.adapter import Adapter, Matrix
from lycoris.algorithm import Affine, Algorithm, Entry, Part
from lycoris.algorithms import ALGORITHMS as KINDS
from lycoris.errors import ConfigError, FileError
from lycoris.geometry import Geometry

EXACT = 1e-10
SHAPES = {"linear": (24, 10), "conv": (24, 10, 3, 3)}


def entry(algorithm: Algorithm, g: Geometry, weight: Tensor) -> Entry | None:
    """With tensors that have an effect; None where the algorithm does not serve the layer."""
    try:
        algorithm.check(g)
    except ConfigError:
        return None
    adapter = Adapter(algorithm, g, dtype=torch.float64)
    adapter.initialise(Matrix(g, weight))
    tensors = {name: t + 0.3 * torch.randn_like(t) for name, t in adapter.whole().items()}
    return Entry(algorithm, g, tensors)


def layer(kind: Any, rows: int = 24) -> Geometry:
    shape = (rows, *SHAPES[kind][1:])
    return Geometry(kind=kind, shape=shape, stride=(1, 1), padding=(0, 0), dilation=(1, 1), pad=(0, 0, 0, 0))


def make(name: str, kind: str, rows_: int = 24) -> tuple[Entry | None, Tensor]:
    torch.manual_seed(zlib.crc32(f"{name} {kind} {rows_}".encode()))
    g = layer(kind, rows_)
    weight = torch.randn(g.shape, dtype=torch.float64)
    return entry(ALGORITHMS[name], g, weight), weight


def change(entry: Entry, weight: Tensor) -> Tensor:
    return recast.adapted(entry, Affine(weight, None)).weight - weight


def refused(error: FileError, *entries: Entry) -> None:
    """Only what the base weight determines may be refused, and by name."""
    assert any(recast.needs_base(each) and each.algorithm.name in str(error) for each in entries)
    assert "layer" in str(error)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("cut", [slice(0, 8), slice(8, 24), slice(5, 11)], ids=str)
def test_cut(name: str, kind: str, cut: slice) -> None:
    whole, weight = make(name, kind)
    if whole is None:
        return
    try:
        step = rows.take(whole, cut, "layer")
    except FileError as error:
        refused(error, whole)
        return
    assert step.entry.geometry.out_features == cut.stop - cut.start
    assert relative(change(step.entry, weight[cut]), change(whole, weight)[cut]) < EXACT
    assert (type(step.entry.algorithm) is not type(whole.algorithm)) == bool(step.note)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_halves_exchanged_twice_are_as_before(name: str, kind: str) -> None:
    whole, weight = make(name, kind)
    if whole is None:
        return
    turned = torch.cat([weight[12:], weight[:12]])
    try:
        once = rows.swapped(whole, "layer").entry
    except FileError as error:
        refused(error, whole)
        return
    expected = change(whole, weight)
    assert relative(change(once, turned), torch.cat([expected[12:], expected[:12]])) < EXACT
    assert relative(change(rows.swapped(once, "layer").entry, weight), expected) < EXACT


@pytest.mark.parametrize("missing", [None, 1])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_joined(name: str, kind: str, missing: int | None) -> None:
    sizes = (8, 12, 4)
    made = [make(name, kind, size) for size in sizes]
    if any(one is None for one, _ in made):
        return
    starts = (0, 8, 20)
    parts = [Part(starts[i], one) for i, (one, _) in enumerate(made) if one is not None and i != missing]
    weight = torch.cat([w for _, w in made])
    try:
        joined = rows.join(parts, layer(kind), "layer")
    except FileError as error:
        refused(error, *(part.entry for part in parts))
        return
    expected = torch.zeros_like(weight)
    for part in parts:
        expected[part.rows] = change(part.entry, weight[part.rows])
    assert relative(change(joined.entry, weight), expected) < EXACT


@pytest.mark.parametrize("name", ALGORITHMS)
def test_cut_apart_and_joined_again(name: str) -> None:
    whole, weight = make(name, "linear")
    if whole is None:
        return
    try:
        parts = [Part(at, rows.take(whole, slice(at, at + 8), "layer").entry) for at in (0, 8, 16)]
        joined = rows.join(parts, whole.geometry, "layer").entry
    except FileError as error:
        refused(error, whole)
        return
    assert relative(change(joined, weight), change(whole, weight)) < EXACT


def test_lokr_of_one_second_factor_stays_a_lokr() -> None:
    whole = entry(
        LoKr(full_matrix=True, factor=4, unbalanced=True), layer("linear"), torch.randn(24, 10, dtype=torch.float64)
    )
    assert whole is not None
    parts = [Part(at, rows.take(whole, slice(at, at + 8), "layer").entry) for at in (0, 8, 16)]
    assert all(isinstance(part.entry.algorithm, LoKr) for part in parts)
    step = rows.join(parts, whole.geometry, "layer")
    assert isinstance(step.entry.algorithm, LoKr)
    assert not step.note
    unaligned = rows.take(whole, slice(0, 7), "layer")
    assert not isinstance(unaligned.entry.algorithm, LoKr)
    assert "lokr became" in unaligned.note


def test_joined_ranks_of_one_scale_keep_the_scale_in_alpha() -> None:
    g = layer("linear", 8)
    weight = torch.randn(8, 10, dtype=torch.float64)
    parts = [Part(at, one) for at in (0, 8, 16) if (one := entry(LoRA(rank=3, alpha=1.5), g, weight)) is not None]
    joined = rows.join(parts, layer("linear"), "layer").entry
    assert joined.algorithm == LoRA(rank=9, alpha=4.5)
    other = [*parts[:2], parts[2]._replace(entry=parts[2].entry._replace(algorithm=LoRA(rank=3, alpha=1.0)))]
    assert rows.join(other, layer("linear"), "layer").entry.algorithm == LoRA(rank=9)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_layout_of_lokr(data: st.DataObject) -> None:
    o, i = data.draw(st.integers(2, 30)), data.draw(st.integers(2, 20))
    algorithm = data.draw(
        st.builds(LoKr, rank=st.integers(1, 4), factor=st.sampled_from([-1, 2, 3, 4]), decompose_both=st.booleans())
    )
    g = replace(layer("linear", o), shape=(o, i))
    weight = torch.randn(o, i, dtype=torch.float64)
    whole = entry(algorithm, g, weight)
    assert whole is not None
    start = data.draw(st.integers(0, o - 1))
    cut = slice(start, data.draw(st.integers(start + 1, o)))
    step = rows.take(whole, cut, "layer")
    assert relative(change(step.entry, weight[cut]), change(whole, weight)[cut]) < EXACT


def test_every_algorithm_says_whether_it_can_be_cut() -> None:
    """One that says nothing must be on this list, so that nobody forgets."""
    silent = {name for name, kind in KINDS.items() if kind.take is Algorithm.take}
    assert silent == {"norm"}
