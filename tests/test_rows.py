"""Adapters of some rows of a layer: cut, with halves exchanged, joined; always the same change of the weight."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import ALGORITHMS, relative
from lycoris import OFT, Full, LoKr, LoRA
from lycoris.adapters.adapter import Adapter
from lycoris.algorithms import ALGORITHMS as KINDS
from lycoris.algorithms import conversion, rows
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.layer_below import BareWeight
from lycoris.algorithms.ranked import Ranked
from lycoris.algorithms.row_selection import RowBlock
from lycoris.errors import ConfigError, FileError
from lycoris.layers.geometry import Affine, Geometry

EXACT = 1e-10
SHAPES: dict[str, tuple[int, ...]] = {"linear": (24, 10), "conv": (24, 10, 3, 3), "norm": (24,)}


def entry(algorithm: Algorithm, g: Geometry, weight: Tensor) -> Entry | None:
    """With tensors that have an effect; None where the algorithm does not serve the layer."""
    try:
        algorithm.check(g)
    except ConfigError:
        return None
    adapter = Adapter(algorithm, g, dtype=torch.float64)
    adapter.initialize(BareWeight(g, weight))
    tensors = {name: t + 0.3 * torch.randn_like(t) for name, t in adapter.whole().items()}
    return Entry(algorithm, g, tensors)


def layer(kind: Any, rows: int = 24) -> Geometry:
    shape, norm = (rows, *SHAPES[kind][1:]), "layer" if kind == "norm" else ""
    return Geometry(norm=norm, kind=kind, shape=shape, stride=(1, 1), padding=(0, 0), dilation=(1, 1), pad=(0, 0, 0, 0))


def make(name: str, kind: str, rows_: int = 24) -> tuple[Entry | None, Tensor]:
    torch.manual_seed(zlib.crc32(f"{name} {kind} {rows_}".encode()))
    g = layer(kind, rows_)
    weight = torch.randn(g.shape, dtype=torch.float64)
    return entry(ALGORITHMS[name], g, weight), weight


def change(entry: Entry, weight: Tensor) -> Tensor:
    """(O, n): what each row of the weight, and its bias, become more."""
    bias = torch.zeros(len(weight), dtype=weight.dtype)
    whole = conversion.adapt_affine(entry, Affine(weight, bias))
    assert whole.bias is not None
    return torch.cat([(whole.weight - weight).reshape(len(weight), -1), whole.bias[:, None]], dim=1)


def refused(error: FileError, *entries: Entry) -> None:
    """Only what the base weight determines may be refused, and by name."""
    assert any(conversion.needs_base(each) and each.algorithm.name in str(error) for each in entries)
    assert "layer" in str(error)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("cut", [slice(0, 8), slice(8, 24), slice(5, 11)], ids=str)
def test_cut(name: str, kind: str, cut: slice) -> None:
    whole, weight = make(name, kind)
    if whole is None:
        return
    try:
        step = rows.take_rows(whole, cut, "layer")
    except FileError as error:
        refused(error, whole)
        return
    assert step.entry.geometry.out_features == cut.stop - cut.start
    assert relative(change(step.entry, weight[cut]), change(whole, weight)[cut]) < EXACT
    kinds = {type(unwrap_dora(each.algorithm)) for each in (step.entry, whole)}
    assert (len(kinds) > 1) == bool(step.note)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_halves_exchanged_twice_are_as_before(name: str, kind: str) -> None:
    whole, weight = make(name, kind)
    if whole is None:
        return
    turned = torch.cat([weight[12:], weight[:12]])
    try:
        once = rows.swap_halves(whole, "layer").entry
    except FileError as error:
        refused(error, whole)
        return
    expected = change(whole, weight)
    assert relative(change(once, turned), torch.cat([expected[12:], expected[:12]])) < EXACT
    assert relative(change(rows.swap_halves(once, "layer").entry, weight), expected) < EXACT


@pytest.mark.parametrize("missing", [None, 1])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_joined(name: str, kind: str, missing: int | None) -> None:
    sizes = (8, 12, 4)
    made = [make(name, kind, size) for size in sizes]
    if any(one is None for one, _ in made):
        return
    starts = (0, 8, 20)
    parts = [RowBlock(starts[i], one) for i, (one, _) in enumerate(made) if one is not None and i != missing]
    weight = torch.cat([w for _, w in made])
    try:
        joined = rows.join_rows(parts, layer(kind), "layer")
    except FileError as error:
        refused(error, *(part.entry for part in parts))
        return
    assert relative(change(joined.entry, weight), changes(parts, weight)) < EXACT


def changes(parts: list[RowBlock], weight: Tensor) -> Tensor:
    """What all of them do to the layer that they are parts of."""
    expected = torch.zeros(len(weight), weight[0].numel() + 1, dtype=torch.float64)
    for part in parts:
        expected[part.rows] = change(part.entry, weight[part.rows])
    return expected


@pytest.mark.parametrize("name", ALGORITHMS)
def test_cut_apart_and_joined_again(name: str) -> None:
    whole, weight = make(name, "linear")
    if whole is None:
        return
    try:
        parts = [RowBlock(at, rows.take_rows(whole, slice(at, at + 8), "layer").entry) for at in (0, 8, 16)]
        joined = rows.join_rows(parts, whole.geometry, "layer").entry
    except FileError as error:
        refused(error, whole)
        return
    assert relative(change(joined, weight), change(whole, weight)) < EXACT


def test_lokr_of_one_second_factor_stays_a_lokr() -> None:
    whole = entry(
        LoKr(full_matrix=True, factor=4, unbalanced=True), layer("linear"), torch.randn(24, 10, dtype=torch.float64)
    )
    assert whole is not None
    parts = [RowBlock(at, rows.take_rows(whole, slice(at, at + 8), "layer").entry) for at in (0, 8, 16)]
    assert all(isinstance(part.entry.algorithm, LoKr) for part in parts)
    step = rows.join_rows(parts, whole.geometry, "layer")
    assert isinstance(step.entry.algorithm, LoKr)
    assert not step.note
    unaligned = rows.take_rows(whole, slice(0, 7), "layer")
    assert not isinstance(unaligned.entry.algorithm, LoKr)
    assert "lokr became" in unaligned.note


def test_joined_ranks_of_one_scale_keep_the_scale_in_alpha() -> None:
    g = layer("linear", 8)
    weight = torch.randn(8, 10, dtype=torch.float64)
    parts = [RowBlock(at, one) for at in (0, 8, 16) if (one := entry(LoRA(rank=3, alpha=1.5), g, weight)) is not None]
    joined = rows.join_rows(parts, layer("linear"), "layer").entry
    assert joined.algorithm == LoRA(rank=9, alpha=4.5)
    other = [*parts[:2], parts[2]._replace(entry=parts[2].entry._replace(algorithm=LoRA(rank=3, alpha=1.0)))]
    assert rows.join_rows(other, layer("linear"), "layer").entry.algorithm == LoRA(rank=9)


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
    step = rows.take_rows(whole, cut, "layer")
    assert relative(change(step.entry, weight[cut]), change(whole, weight)[cut]) < EXACT


def test_every_algorithm_says_whether_it_can_be_cut() -> None:
    """One that says nothing must be on this list, so that nobody forgets."""
    assert not [name for name, kind in KINDS.items() if kind.row_block_size is Algorithm.row_block_size]


DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def stored(entry: Entry, dtype: torch.dtype) -> Entry:
    return entry._replace(tensors={name: tensor.to(dtype) for name, tensor in entry.tensors.items()})


def wide(entry: Entry) -> Entry:
    return stored(entry, torch.float64)


@pytest.mark.parametrize(
    "dtypes", [*((each,) * 3 for each in DTYPES), DTYPES[:3], DTYPES[1:], (*DTYPES[:2], torch.float32)]
)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_low_precision_loses_nothing(name: str, kind: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Cut, turned and joined, at one scale and at several, from what was stored in few bits."""
    parts, start = [], 0
    for size, dtype in zip((8, 12, 4), dtypes, strict=True):
        made, _ = make(name, kind, size)
        if made is None:
            return
        if len(set(dtypes)) > 1 and isinstance(made.algorithm, Ranked):
            made = made._replace(algorithm=replace(made.algorithm, alpha=1.7 * size))
        parts.append(RowBlock(start, stored(made, dtype)))
        start += size
    weight = torch.randn(SHAPES[kind], dtype=torch.float64)
    expected = changes([part._replace(entry=wide(part.entry)) for part in parts], weight)
    first, own = parts[1].entry, expected[parts[1].rows]
    try:
        cut = rows.take_rows(first, slice(2, 8), "layer").entry
        turned = rows.swap_halves(first, "layer").entry
        joined = rows.join_rows(parts, layer(kind), "layer").entry
    except FileError as error:
        refused(error, *(part.entry for part in parts))
        return
    assert relative(change(wide(cut), weight[8:20][2:8]), own[2:8]) < 1e-6
    assert relative(change(wide(turned), weight[8:20].roll(6, 0)), own.roll(6, 0)) < 1e-6
    assert relative(change(wide(joined), weight), expected) < 1e-6


def test_only_what_is_computed_becomes_wider() -> None:
    """A file of half precision stays one."""
    g = layer("linear", 8)
    made = entry(LoRA(rank=3, alpha=1.5), g, torch.randn(8, 10, dtype=torch.float64))
    assert made is not None
    parts = [RowBlock(at, stored(made, torch.bfloat16)) for at in (0, 8, 16)]
    joined = rows.join_rows(parts, layer("linear"), "layer").entry
    assert {tensor.dtype for tensor in joined.tensors.values()} == {torch.bfloat16}
    other = [*parts[:2], parts[2]._replace(entry=stored(made, torch.float16))]
    joined = rows.join_rows(other, layer("linear"), "layer").entry
    assert {tensor.dtype for tensor in joined.tensors.values()} == {torch.float32}


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_rotations_are_joined_with_rows_that_nothing_turns(missing: int) -> None:
    weight = torch.randn(SHAPES["linear"], dtype=torch.float64)
    kinds = (OFT(block_size=4, constraint=0.02), OFT(block_size=4, rescale=True), OFT(block_size=4))
    made = [entry(kind, layer("linear", 8), weight[:8]) for kind in kinds]
    parts = [RowBlock(8 * at, one) for at, one in enumerate(made) if one is not None and at != missing]
    step = rows.join_rows(parts, layer("linear"), "layer")
    assert not step.note
    assert relative(change(step.entry, weight), changes(parts, weight)) < EXACT
    with pytest.raises(FileError, match="diag-oft cannot be joined with others without the base"):
        rows.join_rows([part._replace(start=part.start + 2) for part in parts[:1]], layer("linear"), "layer")


def test_a_weight_and_its_bias_do_not_part() -> None:
    weight, bare = torch.randn(24, 10, dtype=torch.float64), replace(layer("linear"), has_bias=False)
    whole, beside = (entry(kind, layer("linear", 8), weight[:8]) for kind in (Full(), Full(weight=False)))
    assert whole is not None
    assert beside is not None
    for parts in ([RowBlock(0, whole), RowBlock(8, whole)], [RowBlock(0, beside)]):
        with pytest.raises(FileError, match=r"layer: its full changes a bias, and this linear .* has none"):
            rows.join_rows(parts, bare, "layer")
        with pytest.raises(FileError, match="layer: its full changes a bias"):
            rows.place_on(parts[0].entry, replace(layer("linear", 8), has_bias=False), "layer")
    quiet = whole._replace(tensors=whole.tensors | {"diff_b": torch.zeros(8)})
    joined = rows.join_rows([RowBlock(0, quiet)], bare, "layer").entry
    assert joined.tensors.keys() == {"diff"} == joined.algorithm.slots(bare).keys()
