"""Forward, merge, gradients, strength, files: every algorithm on every kind of layer, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cases import LAYERS, NOT_ALONE, PAIRS_WITH_SLICES, WITH_SLICES, adapt
from lycoris import write
from lycoris.algorithms import ALGORITHMS as REGISTRY
from lycoris.algorithms.slices import AdditiveSlice, Slice
from lycoris.errors import FileError
from lycoris.testing import algorithms as contracts


def test_every_kind_of_slice_has_cases() -> None:
    assert {type(case) for case in WITH_SLICES.values()} == {*REGISTRY.values(), Slice, AdditiveSlice}


@pytest.fixture(params=PAIRS_WITH_SLICES, ids="-on-".join)
def pair(request: pytest.FixtureRequest):
    return request.param


def test_contracts(pair) -> None:
    for check in contracts.CONTRACTS:
        if check is not contracts.check_file_round_trip:
            check(WITH_SLICES[pair[0]], LAYERS[pair[1]])


@pytest.mark.parametrize("dialect", ["lycoris", "kohya"])
def test_save_and_load_give_equal_output(pair, dialect: str, tmp_path: Path) -> None:
    algorithm, case = WITH_SLICES[pair[0]], LAYERS[pair[1]]
    if algorithm not in NOT_ALONE:
        contracts.check_file_round_trip(algorithm, case, dialect)
        return
    _, _, adapters = contracts.build(algorithm, case)
    with pytest.raises(FileError, match="given its rows in another order without the base model's weights"):
        write(adapters.bundle(), tmp_path / "a.safetensors", dialect)


def test_forward_reads_as_the_layer_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapt(model, WITH_SLICES["lora"])
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]).__name__ == "Linear"
    x = torch.randn(2, 4)
    assert torch.equal(model[0](input=x), model[0](x))
