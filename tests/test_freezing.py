"""Attaching freezes the base model, detaching gives back what it found."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cases import perturb
from lycoris import AdapterSet, LoRA, Norm, Rule, create_lycoris, plan


def made(model: nn.Module, name: str = "default", path: str = "*") -> AdapterSet:
    return AdapterSet.build(model, plan(model, Rule(LoRA(rank=2), path=path)), name)


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    model[2].bias.requires_grad_(False)
    return model


def training(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


BASE = {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}
OWN = {"0.adapter_default.down", "0.adapter_default.up"}


def test_only_adapters_train_and_detaching_gives_back_what_was() -> None:
    model = net()
    adapters = made(model, path="0").attach()
    assert training(model) == OWN
    adapters.attach()
    adapters.detach()
    assert training(model) == BASE
    adapters.attach(freeze=False)
    assert training(model) == BASE | OWN
    adapters.detach()
    assert training(model) == BASE


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_several_sets_in_any_order(order: tuple[int, ...]) -> None:
    model = net()
    sets = [made(model, f"set{at}").attach() for at in range(3)]
    for at in order:
        assert not training(model) & BASE
        sets[at].detach()
    assert training(model) == BASE


@pytest.mark.parametrize("steps", list(itertools.permutations(["detach A", "unmerge B"])), ids="+".join)
def test_merges_of_another_set_in_between(steps: tuple[str, ...]) -> None:
    model = net()
    other = made(model, "other")
    adapters = made(model).attach()
    other.merge()
    assert not training(model) & BASE
    for step in steps:
        adapters.detach() if step == "detach A" else other.unmerge()
    assert training(model) == BASE


def test_attaching_over_a_merge() -> None:
    model = net()
    other = made(model, "other")
    other.merge()
    adapters = made(model).attach()
    other.unmerge()
    assert not training(model) & BASE
    adapters.detach()
    assert training(model) == BASE


def test_a_copy_is_frozen_like_the_model() -> None:
    model = net()
    adapters = made(model).attach()
    other, own = copy.deepcopy((model, adapters))
    adapters.detach()
    assert not training(other) & BASE
    own.detach()
    assert training(other) == BASE


def test_merging_alone_freezes_nothing() -> None:
    model = net()
    adapters = made(model)
    adapters.merge()
    assert training(model) == BASE
    adapters.unmerge()
    assert training(model) == BASE


@pytest.mark.parametrize("frozen", [False, True])
def test_networks_leave_the_base_alone_and_say_so_once(frozen: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = net().requires_grad_(not frozen)
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1)
    network.apply_to()
    before = training(model)
    with torch.no_grad():
        model(torch.randn(2, 8))
    for _ in range(3):
        with caplog.at_level(logging.WARNING, "LyCORIS"):
            model(torch.randn(2, 8)).sum().backward()
    said = [record.getMessage() for record in caplog.records if "own parameters train" in record.getMessage()]
    assert len(said) == (0 if frozen else 1)
    assert training(model) == before
    network.restore()
    assert not model._forward_pre_hooks


class Ones(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        ids = torch.arange(8) % 7 + at % 3
        return {"input_ids": ids, "labels": ids}


def test_with_the_trainer_of_transformers_the_base_stays(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    size = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = AdapterSet.build(model, plan(model, [Rule(LoRA(rank=2), path="model.*"), Rule(Norm(), kind="norm")]))
    adapters.attach()
    perturb(adapters)
    before = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=Ones()).train()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    assert all(not torch.equal(tensor, before[name]) for name, tensor in adapters.state_dict().items())
