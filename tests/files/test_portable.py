"""Each export by itself: the same change of the layer, in full precision, from half precision, and on stacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import ALGORITHMS, LAYERS, LayerCase, relative
from lycoris import BOFT, OFT, DoRA, Full, LoHa, LoKr, LoRA
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.conversion import adapt_affine
from lycoris.algorithms.tensors import read_tensors, write_tensors
from lycoris.errors import FileError, PlanError
from lycoris.files.programs import PROGRAMS
from lycoris.files.programs.portable import (
    EXPORTS,
    apply_limit,
    complete_diff,
    convert_to_lora,
    flatten_w2,
    make_portable,
    multiply_out_core,
    multiply_out_w1,
)
from test_recast import ROOMY, change, entry_of, is_read_again

TOLERANCE = 1e-10
CORE = LoKr(rank=2, alpha=3.0, tucker=True, factor=2)
EXPORTED = {
    "core of lora": (multiply_out_core, "conv2d", LoRA(rank=3, alpha=1.5, tucker=True, use_scalar=True)),
    "core of lora under dora": (multiply_out_core, "conv3d", DoRA(inner=LoRA(rank=2, tucker=True), axis="in")),
    "core of lokr": (flatten_w2, "conv2d", CORE),
    "core of lokr under dora": (flatten_w2, "conv1d", DoRA(inner=CORE)),
    "unsplit w2": (flatten_w2, "conv3d", LoKr(full_matrix=True, factor=4)),
    "tall w2": (flatten_w2, "linear", LoKr(full_matrix=True, factor=2)),
    "unsplit w2, split w1": (flatten_w2, "linear", LoKr(rank=3, alpha=2.0, decompose_both=True, factor=8)),
    "split w2": (flatten_w2, "linear", LoKr(rank=1)),
    "split w1": (multiply_out_w1, "linear", LoKr(rank=1, alpha=2.0, decompose_both=True, use_scalar=True)),
    "split w1, unsplit w2": (multiply_out_w1, "linear", LoKr(rank=3, alpha=2.0, decompose_both=True, factor=8)),
    "limit of oft": (apply_limit, "linear", OFT(block_size=4, constraint=0.004)),
    "limit of boft": (apply_limit, "conv1d", BOFT(block_size=18, constraint=0.01)),
    "no limit": (apply_limit, "linear", OFT(block_size=4, constraint=1e6)),
    "all ranks": (convert_to_lora, "linear", LoHa(rank=8)),
    "all ranks of a core": (convert_to_lora, "conv2d", LoHa(rank=2, tucker=True)),
    "difference": (convert_to_lora, "conv3d", Full(bias=False)),
    "bias": (complete_diff, "linear", Full(weight=False)),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_does_the_same(name: str) -> None:
    export, layer, algorithm = EXPORTED[name]
    entry, base = entry_of(ROOMY[layer], algorithm)
    made = export(entry)
    assert relative(change(made, base), change(entry, base)) < TOLERANCE
    assert "scalar" not in made.tensors
    is_read_again(made)


@pytest.mark.parametrize("name", ["core of lora", "unsplit w2", "split w1", "limit of oft", "all ranks"])
def test_half_precision_is_not_rounded_again(name: str) -> None:
    export, layer, algorithm = EXPORTED[name]
    entry, base = entry_of(ROOMY[layer], algorithm)
    half = entry._replace(tensors={name: t.bfloat16() for name, t in entry.tensors.items()})
    assert relative(change(export(half), base), change(half, base)) < 1e-6


STACKED = {
    "unsplit w2": (flatten_w2, LoKr(full_matrix=True, factor=2)),
    "split w1": (multiply_out_w1, LoKr(rank=1, alpha=2.0, decompose_both=True)),
    "limit": (apply_limit, OFT(block_size=2, constraint=0.01)),
    "lora": (convert_to_lora, LoHa(rank=1)),
    "all ranks": (convert_to_lora, LoHa(rank=5)),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacks(name: str) -> None:
    export, algorithm = STACKED[name]
    entry, base = entry_of(LAYERS["experts"], algorithm)
    assert relative(change(export(entry), base), change(entry, base)) < TOLERANCE


def test_a_lora_of_all_ranks_is_no_larger_than_it_must_be() -> None:
    tall = entry_of(LayerCase(nn.Linear, (8, 40), {}, (2, 8)), LoHa(rank=7))[0]
    wide = entry_of(LayerCase(nn.Linear, (40, 8), {}, (2, 40)), LoHa(rank=7))[0]
    assert convert_to_lora(tall).algorithm == convert_to_lora(wide).algorithm == LoRA(rank=8)


def test_a_core_is_flattened_at_its_own_rank() -> None:
    entry, _ = entry_of(ROOMY["conv2d"], CORE)
    flat = flatten_w2(entry)
    assert isinstance(flat.algorithm, LoKr)
    assert (flat.algorithm.rank, flat.algorithm.tucker) == (2, False)


@pytest.mark.parametrize(("export", "name"), [(flatten_w2, "lora"), (multiply_out_core, "lokr"), (apply_limit, "lora")])
def test_an_export_of_something_else(export: object, name: str) -> None:
    entry, _ = entry_of(ROOMY["linear"], ALGORITHMS[name])
    with pytest.raises(FileError, match=name):
        export(entry)


def test_lora_cannot_change_a_bias() -> None:
    entry, _ = entry_of(ROOMY["linear"], Full())
    with pytest.raises(FileError, match="changes more than the weight"):
        convert_to_lora(entry)


def test_every_remedy_is_an_export() -> None:
    named = {row.remedy for consumer in PROGRAMS.values() for row in consumer.rows} - {None}
    # That of the scale is for what a file says of itself, not for an adapter.
    assert named | {"scale"} == EXPORTS.keys()


def chained(entry: Entry, consumer: str) -> str:
    return make_portable(entry, consumer)[1]


@pytest.mark.parametrize(
    ("algorithm", "layer", "consumer", "told"),
    [
        (CORE, "conv1d", "webui", "its w2 written as a product of two matrices"),
        (LoRA(rank=2, tucker=True), "conv3d", "comfyui", "its core multiplied into lora_down"),
        (LoRA(rank=2), "conv1d", "webui", "written as the dense difference"),
        (Full(bias=False), "linear", "diffusers", "written as a LoRA"),
        (LoKr(rank=1, decompose_both=True), "linear", "musubi", "its w1 multiplied out"),
        (LoRA(rank=2), "linear", "peft", "nothing"),
    ],
)
def test_it_tells_what_was_done(algorithm: Algorithm, layer: str, consumer: str, told: str) -> None:
    assert chained(entry_of(ROOMY[layer], algorithm)[0], consumer) == told


def test_two_exports_after_each_other() -> None:
    entry, base = entry_of(ROOMY["conv1d"], DoRA(inner=CORE))
    exported, told = make_portable(entry, "comfyui", base)
    assert told.startswith("its w2 written as a product of two matrices, then written as a LoRA where")
    assert relative(adapt_affine(exported, base).weight, adapt_affine(entry, base).weight) < TOLERANCE
    with pytest.raises(PlanError, match="pass the layer's weight and bias as base"):
        make_portable(entry, "comfyui")
    assert entry.tensors["magnitude"].dtype == torch.float64


def test_a_shift_of_zeros_says_nothing_where_a_layer_has_none() -> None:
    entry, _ = entry_of(LAYERS["rms-norm"], ALGORITHMS["norm"])
    exported, _ = make_portable(entry, "webui")
    tensors = write_tensors(exported.algorithm, exported.tensors, exported.geometry)
    assert read_tensors(tensors, entry.geometry, "norm")[1].keys() == {"w"}
    with pytest.raises(FileError, match="no place for b_norm"):
        read_tensors(tensors | {"b_norm": torch.ones(8)}, entry.geometry, "norm")
