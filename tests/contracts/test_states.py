"""Merging, moving, replacing and taking off, in orders that users come up with."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import ALGORITHMS, One, adapt, perturb, relative
from lycoris import AdapterSet, AttachError, ConfigError, FileError, LoRA, RankSchedule, Rule, TLoRA, plan, read, write
from lycoris.adapters import attach, merging
from lycoris.files import encode, resolve
from lycoris.layers import base_weights

NAMES = ["lora", "lokr-whole", "dora-lora", "full"]


def made(*algorithms: str, rank_schedule: bool = False) -> tuple[One, AdapterSet, Tensor]:
    model = One(nn.Linear(8, 6).double())
    adapters = adapt(model, *(ALGORITHMS[name] for name in algorithms))
    if rank_schedule:
        adapters.schedule = RankSchedule(max_rank=3)
    return model, adapters, torch.randn(4, 8).double()


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_does_not_change_the_strength_that_was_set(name: str) -> None:
    model, adapters, x = made(name)
    adapters.set_strength(0.5)
    half = model(x)
    adapters.merge(0.25)
    assert adapters.strength == 0.25
    adapters.unmerge()
    assert adapters.strength == 0.5
    assert torch.equal(model(x), half)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_moved_while_merged_is_where_it_was_moved_after(name: str) -> None:
    model, adapters, x = made(name)
    weight = model.layer.weight.detach().clone()
    adapters.merge()
    model.float()
    adapters.detach()
    assert model.layer.weight.dtype == torch.float32
    assert torch.equal(model.layer.weight, weight.float())
    assert model(x.float()).dtype == torch.float32


def test_what_was_loaded_into_a_merged_model_is_not_thrown_away() -> None:
    model, adapters, _ = made("lora")
    adapters.merge()
    loaded = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    with pytest.raises(AttachError, match="was written to after this merge"):
        adapters.detach()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_a_set_that_is_not_attached_would_have_come_on_top() -> None:
    model, _, _ = made("dora-lora")
    upper = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))), name="upper")
    perturb(upper)
    with pytest.raises(AttachError, match="do not commute"):
        upper.merge()


def test_merged_ranks_beyond_the_schedule_count_as_attached_ones_do() -> None:
    model = One(nn.Linear(8, 8).double())
    adapters = adapt(model, TLoRA(rank=6))
    adapters.schedule, x = RankSchedule(max_rank=4), torch.randn(3, 8).double()
    with adapters.at(timestep=900):
        attached = model(x)
    adapters.merge()
    with adapters.at(timestep=900):
        assert relative(model(x), attached) < 1e-12


@pytest.mark.parametrize("name", ["tlora", "lora"])
def test_merging_from_detached_comes_back_to_detached(name: str) -> None:
    model, adapters, x = made(name, rank_schedule=True)
    adapters.detach()
    before = model(x)
    adapters.merge()
    adapters.attach()
    adapters.detach()
    assert torch.equal(model(x), before)
    adapters.merge()
    adapters.unmerge()
    assert not adapters.attached
    assert torch.equal(model(x), before)
    assert type(model.layer) is nn.Linear


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers_of_torch_do_not_pass_adapters_by(training: bool) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = model(x)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    assert set(adapters.stacks) == {"linear1", "linear2"}, "out_proj is never called"
    perturb(adapters)
    with torch.no_grad():
        assert relative(model(x), before) > 0.01
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())


def test_a_wrapper_that_came_after_still_works_when_adapters_are_gone() -> None:
    model, adapters, x = made("lora")
    wrapped = model.layer.forward
    model.layer.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    adapters.detach()
    plain = nn.functional.linear(x, model.layer.weight, model.layer.bias)
    assert torch.equal(model(x), plain)


def test_a_class_that_came_after_is_not_thrown_away() -> None:
    model, adapters, x = made("lora")
    nn.utils.parametrize.register_parametrization(model.layer, "weight", nn.Identity())
    y = model(x)
    with pytest.raises(AttachError, match="ParametrizedLinear after its adapters were attached"):
        adapters.detach()
    assert torch.equal(model(x), y)


def test_a_replaced_layer_is_noticed() -> None:
    model, adapters, _ = made("lora")
    adapters.detach()
    model.layer = nn.Linear(8, 6)
    with pytest.raises(AttachError, match="layer was replaced by another module"):
        adapters.attach()


def test_a_failed_merge_changes_nothing() -> None:
    model, adapters, x = made("tlora", rank_schedule=True)
    adapters.detach()
    before = model(x)
    model.layer.weight.data = model.layer.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(AttachError, match="stored as float8_e4m3fn"):
        adapters.merge()
    model.layer.weight.data = model.layer.weight.data.double()
    assert not model.layer._modules
    assert before.shape == model(x).shape


def test_files_without_the_frozen_start_are_completed_from_the_base_weight_alone() -> None:
    model, adapters, _ = made()
    adapters = AdapterSet.build(model, plan(model, Rule(TLoRA(rank=2))))
    perturb(adapters)
    tensors = {key: value for key, value in encode(adapters.bundle()).items() if "base_" not in key}
    other = adapt(model, LoRA(rank=4), name="other")
    loaded = AdapterSet.load(model, resolve(tensors, model))
    (whole,), (again,) = adapters.stacks["layer"], loaded.stacks["layer"]
    assert relative(_start(again), _start(whole)) < 1e-9
    other.merge()
    with pytest.raises(FileError, match="adapters are merged into it"):
        AdapterSet.load(model, resolve(tensors, model))


def _start(adapter: nn.Module) -> Tensor:
    return (adapter.p0 * adapter.lam0) @ adapter.q0


def test_a_bias_keeps_whether_it_is_trained(tmp_path) -> None:
    model, adapters, _ = made("full")
    model.layer.bias.requires_grad_(True)
    adapters.merge()
    assert not model.layer.weight.requires_grad
    assert model.layer.bias.requires_grad
    adapters.unmerge()
    write(adapters.bundle(), tmp_path / "a.safetensors")
    assert len(read(tmp_path / "a.safetensors", model).entries) == 1


def test_a_merged_and_followed_model_is_copied_and_pickled() -> None:
    model = One(nn.Linear(8, 8).double())
    adapters = adapt(model, TLoRA(rank=3))
    adapters.schedule, x = RankSchedule(max_rank=3), torch.randn(2, 8).double()
    adapters.merge()
    with adapters.at(timestep=500):
        masked = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), masked)


def test_a_strength_that_is_no_number_is_refused_before_anything_is_merged() -> None:
    model, adapters, x = made("lora")
    y = model(x)
    with pytest.raises(ConfigError, match="strength must be a finite number"):
        adapters.merge(float("nan"))
    assert not adapters.merged
    assert torch.equal(model(x), y)


def test_one_layer_has_a_strength_of_its_own_until_all_are_set() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8).double() for _ in range(3)))
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    perturb(adapters)
    x = torch.randn(4, 8).double()
    adapters.set_strength(0.0, {"2": 0.5})
    adapters.set_strength(0.7, at="0")
    adapters.set_strength(-1.5, at="2")
    assert [adapters.strength * adapters.strengths.factor(path) for path in "012"] == [0.7, 0.0, -1.5]
    once = model(x)
    adapters.merge()
    assert relative(model(x), once) < 1e-12
    with pytest.raises(AttachError, match="are merged at strength"):
        adapters.set_strength(1.0, at="0")
    adapters.unmerge()
    with pytest.raises(ConfigError, match=r"3.*layer with adapters|layer with adapters.*3"):
        adapters.set_strength(1.0, at="3")
    adapters.set_strength(1.0)
    assert [adapters.strengths.factor(path) for path in "012"] == [1.0] * 3


class Interrupted(KeyboardInterrupt):
    """What no code expects."""


def fail_at(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, nth: int) -> None:
    """Let the nth call of a function from now on be interrupted, before it does anything."""
    real, calls = getattr(where, name), itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise Interrupted
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, failing)


@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize(
    ("where", "what", "attached"),
    [
        (base_weights, "install", True),
        (base_weights, "install", False),
        (merging, "fold", True),
        (merging, "fold", False),
        (attach, "attach", False),
    ],
)
def test_an_interrupted_merge_leaves_everything_as_it_was(
    where: Any, what: str, attached: bool, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(3, 8)
    adapters = adapt(model, TLoRA(rank=3))
    adapters.schedule = RankSchedule(max_rank=3)
    if not attached:
        adapters.detach()
    y, weights = model(x), [id(parameter) for parameter in model.parameters()]
    with monkeypatch.context() as patch:
        fail_at(patch, where, what, nth)
        with pytest.raises(Interrupted):
            adapters.merge()
    assert (adapters.attached, adapters.merged) == (attached, False)
    assert torch.equal(model(x), y)
    assert [id(parameter) for parameter in model.parameters()] == weights
    adapters.merge()
    adapters.unmerge()
    assert adapters.attached == attached
    assert torch.equal(model(x), y)


class Nested(nn.Linear):
    """A layer that holds another."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.inside = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(super().forward(x))


@pytest.mark.parametrize("all_at", [1.0, 0.5])
def test_the_strength_of_a_layer_is_not_that_of_layers_inside_it(all_at: float) -> None:
    model = One(Nested())
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2))))
    adapters.set_strength(all_at)
    adapters.set_strength(0.25, at="layer")
    assert [adapters.strengths.at(path) for path in ("layer", "layer.inside")] == [0.25, all_at]


@pytest.mark.parametrize("name", ["lora", "tlora"])
def test_nothing_is_loaded_into_merged_adapters(name: str) -> None:
    _, adapters, _ = made(name, rank_schedule=True)
    state, bundle = {key: t.clone() for key, t in adapters.state_dict().items()}, adapters.bundle()
    adapters.merge()
    with adapters.at(timestep=500 if name == "tlora" else None):
        for load in (
            lambda: adapters.load_state_dict({k: t + 1 for k, t in state.items()}),
            lambda: adapters.fill(bundle),
        ):
            with pytest.raises(AttachError, match="merged"):
                load()
    assert all(torch.equal(t, state[key]) for key, t in adapters.state_dict().items())


@pytest.mark.parametrize("name", ["lora", "tlora"])
@pytest.mark.parametrize("use", ["attach", "merge"])
def test_of_sets_with_the_same_adapters_one_is_in_force(name: str, use: str) -> None:
    model, adapters, x = made(name, rank_schedule=True)
    adapters.detach()
    other = AdapterSet(model, adapters.stacks, name=None)
    other.schedule = adapters.schedule
    other.set_strength(0.5)
    getattr(other, use)()
    y = model(x)
    for call in (adapters.attach, adapters.merge):
        with pytest.raises(AttachError, match="another set has the adapter of layer"):
            call()
    adapters.set_strength(2.0)
    adapters.set_rank_mask(torch.tensor([[1.0, 0.0, 0.0]]))
    adapters.detach()
    assert torch.equal(model(x), y)
    other.detach()
    adapters.set_rank_mask(None)
    adapters.attach()
    double = model(x)
    adapters.set_strength(1.0)
    adapters.set_strength(2.0)
    assert torch.equal(model(x), double)


def test_blocks_at_which_a_set_was_merged_count_until_it_is_unmerged() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    adapters = adapt(model, TLoRA(rank=3))
    adapters.schedule, x = RankSchedule(max_rank=3), torch.randn(2, 8).double()
    nothing = torch.zeros(1, 3)
    adapters.set_strength(0.0)
    base = model(x)
    adapters.set_strength(1.0)
    with adapters.at(strength=0.5):
        adapters.set_strength(-1.5, at="0")
        adapters.merge()
    adapters.set_rank_mask(nothing)
    assert relative(model(x), base) < 1e-9
