"""Filling adapters that are there from a bundle, and making new ones from it: the same adapters, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from cases import LAYERS, PAIRS_WITH_SLICES, WITH_SLICES, One, adapt, dense, relative, serves
from lycoris import IA3, OFT, AdapterSet, Full, LoRA, Rule, TLoRA, plan
from lycoris.algorithms import DoRA
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.slices import Slice
from lycoris.errors import ConfigError, FileError
from lycoris.files import encode, resolve

EVERY = pytest.mark.parametrize(
    ("name", "layer"), PAIRS_WITH_SLICES, ids=["-on-".join(pair) for pair in PAIRS_WITH_SLICES]
)
SQUARE = ("linear-one-vector", "conv2d", "embedding", "rms-norm", "experts")
"""Among them a layer whose inputs are as many as its outputs, on which shapes tell least."""
OTHER: dict[str, tuple[Any, ...]] = {"bool": (True, False), "Axis": ("out", "in"), "Vectors": ("last", "middle")}
"""Values of a setting, by its type."""


@pytest.mark.each_value
@EVERY
def test_filling_a_set_with_its_own_bundle_changes_nothing(name: str, layer: str) -> None:
    model, x = One(LAYERS[layer].layer()).eval(), LAYERS[layer].input()
    adapters = adapt(model, WITH_SLICES[name])
    before, y = adapters.state_dict(), model(x)
    before = {key: tensor.clone() for key, tensor in before.items()}
    adapters.fill(adapters.bundle())
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapters.state_dict().items())
    assert torch.equal(model(x), y)


@pytest.mark.each_value
@EVERY
def test_filling_a_set_with_its_own_file_changes_nothing_that_it_does(name: str, layer: str) -> None:
    model, x = One(LAYERS[layer].layer()).eval(), LAYERS[layer].input()
    adapters = adapt(model, WITH_SLICES[name])
    y = model(x)
    if isinstance(WITH_SLICES[name], Slice):
        # What of it a file can hold by itself are other tensors.
        with pytest.raises(FileError):
            adapters.fill(resolve(encode(adapters.bundle()), model))
        return
    adapters.fill(resolve(encode(adapters.bundle()), model))
    # Settings that a file keeps as a tensor are float32 there.
    assert relative(model(x), y) < 1e-6


def variants(algorithm: Algorithm) -> Iterator[Algorithm]:
    """The algorithm with one of its settings at another value."""
    for field in fields(algorithm):
        value = getattr(algorithm, field.name)
        if isinstance(value, Algorithm):
            others: Any = variants(value)
        elif field.type in ("int", "float", "float | None"):
            others = (2 * (value or 0.5), (value or 0.0) + (1 if field.type == "int" else 0.25))
        else:
            others = OTHER.get(str(field.type), ())
        for other in others:
            try:
                changed = replace(algorithm, **{field.name: other})
            except ConfigError:
                continue
            if changed != algorithm:
                yield changed


ALL = [
    pytest.param(algorithm, variant, layer, id=f"{algorithm} from {variant} on {layer}")
    for algorithm in WITH_SLICES.values()
    for variant in variants(algorithm)
    for layer in SQUARE
    if all(serves(One(LAYERS[layer].layer()), each) for each in (algorithm, variant))
]


@pytest.mark.each_value
@pytest.mark.parametrize(("algorithm", "variant", "layer"), ALL)
def test_another_setting_does_the_same_or_is_refused(algorithm: Algorithm, variant: Algorithm, layer: str) -> None:
    model, x = One(LAYERS[layer].layer()).eval(), LAYERS[layer].input()
    source = adapt(model, variant)
    wanted, bundle = dense(model, x), source.bundle()
    source.detach()
    adapters = adapt(model, algorithm)
    before = {key: tensor.clone() for key, tensor in adapters.state_dict().items()}
    refused = ""
    try:
        adapters.fill(bundle)
    except FileError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(("layer: the file has ", "layer.experts: the file has "))
        assert all(torch.equal(tensor, before[key]) for key, tensor in adapters.state_dict().items())
    else:
        assert relative(dense(model, x), wanted) < 1e-10


@pytest.mark.parametrize(
    ("algorithm", "variant"),
    [
        (IA3(), IA3(on_input=True)),
        (OFT(block_size=2), OFT(block_size=2, constraint=0.02)),
        (LoRA(rank=2), LoRA(rank=2, alpha=1.0)),
        (LoRA(rank=2), LoRA(rank=3)),
        (DoRA(inner=LoRA(rank=2)), DoRA(inner=LoRA(rank=2, alpha=1.0))),
    ],
    ids=str,
)
def test_what_is_refused_names_the_layer_and_both(algorithm: Algorithm, variant: Algorithm) -> None:
    model = One(nn.Linear(8, 8))
    bundle = AdapterSet.build(model, plan(model, Rule(variant))).bundle()
    adapters = AdapterSet.build(model, plan(model, Rule(algorithm)))
    with pytest.raises(FileError) as caught:
        adapters.fill(bundle)
    assert str(caught.value).startswith(f"layer: the file has {variant}, the adapter is {algorithm}")


def test_a_start_that_a_file_leaves_out_is_the_adapters_own() -> None:
    model, x = One(LAYERS["linear"].layer()).eval(), LAYERS["linear"].input()
    adapters = adapt(model, TLoRA(rank=2, vectors="last"))
    y, tensors = model(x), {key: t for key, t in encode(adapters.bundle()).items() if "base_" not in key}
    adapters.fill(resolve(tensors, model))
    assert relative(model(x), y) < 1e-9
    drawn = adapt(model, TLoRA(rank=2, data_init=False), name="drawn")
    with pytest.raises(FileError, match="random vectors, which nothing but the file could tell"):
        drawn.fill(resolve(tensors, model))


MISFITS: dict[str, tuple[nn.Module, nn.Module, str]] = {
    "shape": (nn.Linear(8, 6), nn.Linear(8, 4), r"linear \(6, 8\).*linear \(4, 8\)"),
    "kind": (nn.Linear(8, 6), nn.Conv2d(8, 6, 1), r"linear \(6, 8\).*conv \(6, 8, 1, 1\)"),
    "turned": (nn.Embedding(8, 8), nn.Linear(8, 8), r"embedding \(8, 8\).*linear \(8, 8\)"),
    "bias": (nn.Linear(8, 6), nn.Linear(8, 6, bias=False), r"diff_b \(6,\) in the file and none here"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_bundle_for_another_shape_is_refused(case: str) -> None:
    made, other, told = MISFITS[case]
    bundle = AdapterSet.build(model := One(made), plan(model, Rule(Full(), kind="*"))).bundle()
    with pytest.raises(FileError, match=f"^layer: .*{told}"):
        AdapterSet.load(One(other), bundle)


def test_a_bundle_for_other_layers_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    bundle = AdapterSet.build(model, plan(model, Rule(LoRA()))).bundle()
    with pytest.raises(FileError, match=r"1 of 2 layers are no layers of this Sequential: 0\.0"):
        AdapterSet.load(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), bundle)


def test_the_layers_own_stride_counts() -> None:
    one, two = One(nn.Conv2d(4, 4, 3)), One(nn.Conv2d(4, 4, 3, stride=2, padding=1))
    bundle = adapt(one, LoRA(rank=2)).bundle()
    adapters, x = AdapterSet.load(two, bundle).attach(), torch.randn(1, 4, 6, 6)
    assert relative(two(x), dense(two, x)) < 1e-5
    assert adapters.bundle().entries["layer"][0].geometry.stride == (2, 2)
