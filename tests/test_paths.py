"""The same layers have the same paths, and the same order, whatever wraps them and however a set was made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

from cases import adapt, perturb, relative
from lycoris import AdapterSet, FileError, LoRA, Rule, create_lycoris, create_lycoris_from_weights, plan, read, write
from lycoris.layers import paths
from lycoris.layers.sites import ModelSites, class_name

# torch looks at the gradient of every input of a compiled function.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.ff, self.attn = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(torch.tanh(self.ff(self.to_q(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def by_block(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def run(model: nn.Module) -> nn.Module:
        model.blocks = nn.ModuleList(wrap(block) for block in model.blocks)
        return model

    return run


def layerwise(model: nn.Module) -> nn.Module:
    model.head = torch.compile(model.head, backend="eager")
    return model


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled by block": by_block(lambda block: torch.compile(block, backend="eager")),
    "a compiled layer": layerwise,
    "checkpointed by block": by_block(checkpoint_wrapper),
    "offloaded by block": by_block(offload_wrapper),
    "compiled and checkpointed": by_block(lambda b: checkpoint_wrapper(torch.compile(b, backend="eager"))),
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
}
EVERY = pytest.mark.parametrize("way", list(WRAPPED))


@EVERY
def test_paths_are_those_without_the_wrapper(way: str) -> None:
    plain, wrapped = Net(), WRAPPED[way](Net())
    assert [*ModelSites(wrapped)] == [*ModelSites(plain)]
    assert class_name(wrapped) == "Net"
    for place in ModelSites(wrapped).values():
        assert ModelSites(wrapped).find(place.path).module is place.module
    assert paths.model_order(wrapped) == paths.model_order(plain)


@pytest.mark.sample(2)
@EVERY
def test_files_go_both_ways(way: str, tmp_path: Path) -> None:
    plain = Net()
    wrapped = WRAPPED[way](copy.deepcopy(plain))
    x = torch.randn(2, 8)
    for at, (one, other) in enumerate([(plain, wrapped), (wrapped, plain)]):
        adapters = adapt(one, LoRA(rank=2))
        file = tmp_path / f"{at}.safetensors"
        write(adapters.bundle(), file)
        expected = one(x)
        adapters.detach()
        loaded = AdapterSet.load(other, read(file, other)).attach()
        assert relative(other(x), expected) < 1e-6
        loaded.detach()


@pytest.mark.sample(4)
@EVERY
def test_a_set_goes_on_working_when_its_model_is_wrapped_later(way: str, tmp_path: Path) -> None:
    model, x = Net(), torch.randn(2, 8)
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1)
    network.apply_to()
    perturb(network.adapters)
    file = str(tmp_path / "a.safetensors")
    network.save_weights(file, None, {})
    expected = model(x)
    wrapped = WRAPPED[way](model)
    assert network.load_weights(file) == {}
    assert relative(wrapped(x), expected) < 1e-6
    if way != "averaged":
        network.restore()
        network.merge_to()
        assert relative(wrapped(x), expected) < 1e-5
        network.restore()


def test_peft_around_the_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = Net()
    adapters = adapt(plain, LoRA(rank=2))
    write(adapters.bundle(), tmp_path / "a.safetensors")
    adapters.detach()
    wrapped = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(target_modules=["head"], r=2))
    assert class_name(wrapped) == "Net"
    assert {"blocks.0.to_q", "blocks.1.attn"} <= {place.path for place in ModelSites(wrapped).values()}
    with pytest.raises(FileError, match="take them off first"):
        AdapterSet.load(wrapped, read(tmp_path / "a.safetensors", plain))
    own = AdapterSet.build(wrapped, plan(wrapped, Rule(LoRA(rank=2), path="blocks.*"))).attach()
    write(own.bundle(), tmp_path / "b.safetensors")
    assert read(tmp_path / "b.safetensors", plain).entries.keys() == own.stacks.keys()


def makers(tmp_path: Path) -> dict[str, Callable[[nn.Module], AdapterSet]]:
    file = tmp_path / "order.safetensors"
    write(adapt(Net(), LoRA(rank=2)).bundle(), file)

    def shuffled(model: nn.Module) -> AdapterSet:
        stacks = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).stacks
        return AdapterSet(model, dict(sorted(stacks.items(), reverse=True)))

    return {
        "built": lambda model: AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))),
        "rules": lambda m: AdapterSet.build(m, plan(m, [Rule(LoRA(rank=2), path="*attn"), Rule(LoRA(rank=2))])),
        "loaded": lambda model: AdapterSet.load(model, read(file, model)),
        "shuffled": shuffled,
        "created": lambda model: create_lycoris(model, 1.0, linear_dim=2, linear_alpha=2).adapters,
        "from weights": lambda model: create_lycoris_from_weights(1.0, file, model)[0].adapters,
    }


def test_parameters_are_in_the_order_of_the_model_however_a_set_was_made(tmp_path: Path) -> None:
    model = Net()
    wanted = [f"{place.path}/0/{slot}" for place in ModelSites(model).values() for slot in ("down", "up")]
    for way, make in makers(tmp_path).items():
        adapters = make(Net())
        names = [name for name, _ in adapters.named_parameters()]
        assert sorted(names) == sorted(wanted), way
        assert [name.split("/")[0] for name in names] == [name.split("/")[0] for name in wanted], way
        assert list(adapters.state_dict()) == names, way
        assert [id(p) for p in adapters.parameters()] == [id(p) for _, p in adapters.named_parameters()]
        assert list(adapters.bundle().entries) == [place.path for place in ModelSites(model).values()], way


def test_networks_list_parameters_and_tensors_in_that_order_too(tmp_path: Path) -> None:
    file = str(tmp_path / "a.safetensors")
    network = create_lycoris(Net(), 1.0, linear_dim=2, linear_alpha=1)
    network.save_weights(file, None, {})
    other, _ = create_lycoris_from_weights(1.0, file, Net())
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in network.named_parameters()]
    assert list(other.state_dict()) == list(network.state_dict())
    assert [module.lora_name for module in other.loras] == [module.lora_name for module in network.loras]
