"""Recasting changes the form and nothing else: every algorithm on every kind of layer, and some with room to spare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cases import ALGORITHMS, LAYERS, PAIRS, LayerCase, One, adapt, relative
from lycoris import DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, TLoRA
from lycoris.algorithms import Norm
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.conversion import adapt_affine, dense, low_rank, needs_base
from lycoris.algorithms.layer_below import BareWeight
from lycoris.algorithms.tensors import read_tensors, write_tensors
from lycoris.errors import PlanError
from lycoris.layers.geometry import Affine
from lycoris.layers.sites import ModelSites

TOLERANCE = 1e-10

ROOMY: dict[str, LayerCase] = {
    "linear": LayerCase(nn.Linear, (48, 60), {}, (2, 48)),
    "conv1d": LayerCase(nn.Conv1d, (24, 36, 3), {}, (2, 24, 9)),
    "conv2d": LayerCase(nn.Conv2d, (24, 36, 3), {}, (2, 24, 5, 6)),
    "conv2d-groups": LayerCase(nn.Conv2d, (48, 32, 3), {"groups": 2}, (2, 48, 4, 4)),
    "conv3d": LayerCase(nn.Conv3d, (16, 24, (1, 3, 3)), {}, (1, 16, 2, 4, 5)),
}
THIN: dict[str, Algorithm] = {
    "lora-scalar": LoRA(rank=2, use_scalar=True),
    "lora-tucker": LoRA(rank=3, alpha=1.5, tucker=True),
    "loha": LoHa(rank=2, alpha=1.0),
    "lokr": LoKr(rank=1, alpha=0.5),
    "lokr-both": LoKr(rank=1, alpha=2.0, decompose_both=True),
    "lokr-tucker": LoKr(rank=1, alpha=2.0, tucker=True),
    "lokr-unbalanced": LoKr(rank=1, alpha=2.0, unbalanced=True, factor=4),
    "dylora-rs": DyLoRA(rank=4, block_size=2, rs_lora=True),
    "tlora": TLoRA(rank=2, alpha=1.0),
    "glora": GLoRA(rank=1, alpha=2.0),
}
"""Those that have factors."""


def entry_of(case: LayerCase, algorithm: Algorithm) -> tuple[Entry, Affine]:
    """An adapter with an effect on a layer, and what lies below it."""
    model = One(case.layer())
    ((_, layer, attribute, geometry),) = ModelSites(model).values()
    weight = getattr(layer, attribute or "weight").detach().clone()
    bias = None if attribute else getattr(layer, "bias", None)
    (stack,) = adapt(model, algorithm).bundle().entries.values()
    return stack[0], Affine(geometry.transpose_stored(weight), None if bias is None else bias.detach().clone())


def change(entry: Entry, base: Affine) -> Tensor:
    """What an entry adds to the weight, and to the bias if it does."""
    made = adapt_affine(entry, base)
    parts = [(made.weight - base.weight).flatten()]
    if made.bias is not None and base.bias is not None:
        parts.append(made.bias - base.bias)
    return torch.cat(parts)


def is_read_again(entry: Entry) -> None:
    again, tensors = read_tensors(
        write_tensors(entry.algorithm, entry.tensors, entry.geometry), entry.geometry, "layer"
    )
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in entry.tensors.items()}
    assert again.scale(entry.geometry) == pytest.approx(entry.algorithm.scale(entry.geometry), rel=1e-6)


@pytest.fixture(params=PAIRS, ids="-on-".join)
def made(request: pytest.FixtureRequest) -> tuple[Entry, Affine]:
    name, layer = request.param
    return entry_of(LAYERS[layer], ALGORITHMS[name])


@pytest.mark.each_value
def test_a_dense_entry_does_the_same(made: tuple[Entry, Affine]) -> None:
    entry, base = made
    whole = dense(entry, base if needs_base(entry) else None)
    assert isinstance(whole.algorithm, Full | Norm)
    assert relative(change(whole, base), change(entry, base)) < TOLERANCE
    is_read_again(whole)


@pytest.mark.each_value
def test_a_low_rank_entry_does_the_same(made: tuple[Entry, Affine]) -> None:
    entry, base = made
    thin = low_rank(entry, base, always=True)
    if thin is None:
        assert isinstance(entry.algorithm, Norm | Full | DoRA) or needs_base(entry) or "t1" in entry.tensors
        return
    assert type(thin.algorithm) is LoRA
    assert relative(change(thin, base), change(entry, base)) < TOLERANCE
    is_read_again(thin)


@pytest.mark.parametrize("layer", ROOMY)
@pytest.mark.parametrize("name", THIN)
def test_factors_are_kept_where_they_are_thinner(name: str, layer: str) -> None:
    entry, base = entry_of(ROOMY[layer], THIN[name])
    thin = low_rank(entry, base)
    assert thin is not None
    assert sum(t.numel() for t in thin.tensors.values()) < entry.geometry.size
    assert relative(change(thin, base), change(entry, base)) < TOLERANCE


def test_factors_as_large_as_the_weight_are_not_worth_keeping() -> None:
    entry, _ = entry_of(ROOMY["linear"], LoHa(rank=8))
    assert low_rank(entry) is None
    assert low_rank(entry, always=True) is not None


def test_a_plain_lora_stays_as_it_is() -> None:
    entry, _ = entry_of(ROOMY["linear"], LoRA(rank=100))
    assert low_rank(entry) is entry


@pytest.mark.parametrize("name", ["ia3", "oft", "boft", "dora-lora", "glora"])
def test_what_depends_on_the_weight_asks_for_it(name: str) -> None:
    entry, _ = entry_of(LAYERS["linear-one-vector"], ALGORITHMS[name])
    assert needs_base(entry)
    with pytest.raises(PlanError, match=r"depends on the weight below it.*pass the layer's weight"):
        dense(entry)


def test_a_tlora_without_its_start_takes_it_from_the_weight() -> None:
    entry, base = entry_of(ROOMY["linear"], TLoRA(rank=2))
    short = entry._replace(tensors={name: t for name, t in entry.tensors.items() if not name.endswith("0")})
    assert needs_base(short)
    assert not needs_base(entry)
    for recast in (dense, low_rank):
        with pytest.raises(PlanError, match="tlora"):
            recast(short)
    whole = entry._replace(tensors=entry.algorithm.fill_missing(short.tensors, BareWeight(entry.geometry, base.weight)))
    for recast in (dense, low_rank):
        assert relative(change(recast(short, base), base), change(whole, base)) < TOLERANCE


def test_half_precision_is_recast_in_float32() -> None:
    entry, _ = entry_of(ROOMY["linear"], LoHa(rank=2))
    half = entry._replace(tensors={name: t.bfloat16() for name, t in entry.tensors.items()})
    assert {t.dtype for t in dense(half).tensors.values()} == {torch.float32}
    thin = low_rank(half)
    assert thin is not None
    assert {t.dtype for t in thin.tensors.values()} == {torch.float32}
