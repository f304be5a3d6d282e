"""Forward, merge, gradients, strength, files: every algorithm on every kind of layer, in float64."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

from cases import LAYERS, NOT_ALONE, PAIRS_WITH_SLICES, WITH_SLICES, One, adapt, dense, relative
from lycoris import AdapterSet, read, write
from lycoris.algorithms import ALGORITHMS as REGISTRY
from lycoris.algorithms.slices import AdditiveSlice, Slice
from lycoris.errors import FileError

TOLERANCE = 1e-10


def test_every_registered_algorithm_has_cases() -> None:
    assert {case.name for case in WITH_SLICES.values()} == set(REGISTRY)
    assert {type(case) for case in WITH_SLICES.values()} == {*REGISTRY.values(), Slice, AdditiveSlice}


@pytest.fixture(params=PAIRS_WITH_SLICES, ids="-on-".join)
def pair(request: pytest.FixtureRequest):
    return request.param


@pytest.fixture
def algorithm(pair):
    return WITH_SLICES[pair[0]]


@pytest.fixture
def case(pair):
    return LAYERS[pair[1]]


def made(case, algorithm, random: bool = True):
    """A model in evaluation mode, where nothing is drawn."""
    model = One(case.layer()).eval()
    return model, case.input(), adapt(model, algorithm, random=random)


def test_a_fresh_adapter_changes_nothing(algorithm, case) -> None:
    model, x = One(case.layer()), case.input()
    before = model(x)
    adapt(model, algorithm, random=False)
    assert torch.equal(model.eval()(x), before)
    assert torch.equal(model.train()(x), before)
    assert model(x).stride() == before.stride(), "what follows computes to the last bit alike only in one layout"


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_factored_forward_equals_merged_forward(algorithm, case, strength: float) -> None:
    model, x, adapters = made(case, algorithm)
    adapters.set_strength(strength)
    attached = model(x)
    assert relative(attached, dense(model, x)) < TOLERANCE
    _merge(adapters)
    assert relative(model(x), attached) < TOLERANCE


def test_strength_zero_is_the_base_layer_exactly(algorithm, case) -> None:
    model, x = One(case.layer()).eval(), case.input()
    before = model(x)
    adapters = adapt(model, algorithm)
    assert not torch.equal(model(x), before)
    adapters.set_strength(0)
    assert torch.equal(model(x), before)


def test_strength_is_a_straight_line(algorithm, case) -> None:
    model, x = One(case.layer()).eval(), case.input()
    base = model(x)
    adapters = adapt(model, algorithm)
    whole = model(x)
    adapters.set_strength(0.3)
    assert relative(model(x), base + 0.3 * (whole - base)) < TOLERANCE


def test_gradients_of_both_ways_agree(algorithm, case) -> None:
    model, x, adapters = made(case, algorithm)
    model.requires_grad_(True)
    adapters.set_strength(0.7)
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    parameters = [*inputs, *adapters.parameters(), *(p for p in model.parameters() if p.dim() == 1)]
    weights = torch.randn_like(model(x))
    fast = torch.autograd.grad((model(x) * weights).sum(), parameters, allow_unused=True)
    slow = torch.autograd.grad((dense(model, x) * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(fast, slow, strict=True):
        assert a is not None
        assert b is not None
        # Gradients that cancel to nothing have no scale of their own.
        assert (a - b).abs().max() < TOLERANCE * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("dialect", ["lycoris", "kohya"])
def test_save_and_load_give_equal_output(algorithm, case, dialect: str, tmp_path: Path) -> None:
    model, x, adapters = made(case, algorithm)
    trained = model(x)
    if algorithm in NOT_ALONE:
        with pytest.raises(FileError, match="given its rows in another order without the base model's weights"):
            write(adapters.bundle(), tmp_path / "a.safetensors", dialect)
        return
    write(adapters.bundle(), tmp_path / "a.safetensors", dialect)
    adapters.detach()
    loaded = AdapterSet.load(model, read(tmp_path / "a.safetensors", model))
    loaded.attach()
    # Gates are folded and alpha is stored in float32.
    assert relative(model(x), trained) < 1e-6


def test_detached_leaves_no_trace(algorithm, case) -> None:
    model, x = One(case.layer()).eval(), case.input()
    before, keys, cls, own = model(x), list(model.state_dict()), type(model.layer), set(model.layer.__dict__)
    adapters = adapt(model, algorithm)
    assert list(model.state_dict()) == keys
    model.load_state_dict(model.state_dict(), strict=True)
    adapters.detach()
    assert type(model.layer) is cls
    assert set(model.layer.__dict__) == own
    assert not model.layer._modules
    assert torch.equal(model(x), before)


def test_unmerge_restores_the_same_parameters(algorithm, case) -> None:
    model, x = One(case.layer()).eval(), case.input()
    parameters, before = dict(model.layer._parameters), model(x)
    adapters = adapt(model, algorithm)
    attached = model(x)
    _merge(adapters)
    adapters.unmerge()
    assert all(model.layer._parameters[name] is parameter for name, parameter in parameters.items())
    assert torch.equal(model(x), attached)
    adapters.detach()
    assert torch.equal(model(x), before)


def _merge(adapters: AdapterSet) -> None:
    with pytest.warns(UserWarning, match="timestep schedule") if adapters.rank_masked else contextlib.nullcontext():
        adapters.merge()


def test_forward_reads_as_the_layer_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapt(model, WITH_SLICES["lora"])
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]).__name__ == "Linear"
    x = torch.randn(2, 4)
    assert torch.equal(model[0](input=x), model[0](x))
