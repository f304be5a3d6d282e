"""A model's layers are found once: what is built on them afterwards describes none again."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lycoris
from lycoris import AdapterSet, LoRA, PlanError, Rule, files, plan
from lycoris.demo import demo
from lycoris.kohya import create_network, create_network_from_weights
from lycoris.layers import sites as sites_module
from lycoris.layers.sites import ModelSites

LAYERS = 123
"""Of the demo's UNet."""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class Calls(list[type]):
    """The class of every module that was described."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found, describe = Calls(), sites_module.describe

    def counting(module: nn.Module) -> object:
        found.append(type(module))
        return describe(module)

    monkeypatch.setattr(sites_module, "describe", counting)
    return found


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    config = json.loads((demo.DEMO_ASSETS / "base" / "unet" / "config.json").read_text())
    model: nn.Module = UNet2DConditionModel.from_config(config)
    return model


@pytest.fixture(scope="module")
def file(unet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("sites") / "a.safetensors"
    network = lycoris.create_lycoris(unet, 1.0, linear_dim=2, linear_alpha=1, algo="lora")
    network.save_weights(path, None)
    return path


def test_the_model_of_this_page(unet: nn.Module) -> None:
    assert len(ModelSites(unet)) == LAYERS


def test_create_lycoris_describes_each_layer_once(unet: nn.Module, calls: Calls) -> None:
    network = lycoris.create_lycoris(unet, 1.0, linear_dim=2, linear_alpha=1, algo="lora")
    assert len(network.loras) > 80
    assert len(calls) <= LAYERS
    network.apply_to()
    network.restore()
    network.merge_to()
    network.restore()
    assert len(calls) <= LAYERS


def test_a_file_is_loaded_with_one_description_of_each_layer(unet: nn.Module, file: Path, calls: Calls) -> None:
    lycoris.create_lycoris_from_weights(1.0, file, unet)
    assert len(calls) <= LAYERS


def test_networks_of_other_trainers_describe_each_layer_once(unet: nn.Module, tmp_path: Path, calls: Calls) -> None:
    network = create_network(1.0, 2, 1, None, None, unet)
    assert len(calls) <= LAYERS
    network.save_weights(tmp_path / "a.safetensors", None)
    calls.clear()
    create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, unet)
    assert len(calls) <= LAYERS


def test_reading_and_loading_describe_each_layer_once_each(unet: nn.Module, file: Path, calls: Calls) -> None:
    bundle = files.read(file, unet)
    assert len(calls) <= LAYERS
    calls.clear()
    adapters = AdapterSet.load(unet, bundle)
    assert len(calls) <= LAYERS
    adapters.attach()
    adapters.merge()
    adapters.unmerge()
    adapters.fill(adapters.bundle())
    adapters.detach()
    assert len(calls) <= LAYERS


def test_sites_that_are_passed_on_spare_the_second_search(unet: nn.Module, file: Path, calls: Calls) -> None:
    sites = ModelSites(unet)
    AdapterSet.load(sites, files.read(file, sites))
    AdapterSet.build(unet, plan(sites, Rule(LoRA(rank=2))))
    assert len(calls) <= LAYERS


def test_building_a_plan_describes_nothing(unet: nn.Module, calls: Calls) -> None:
    made = plan(unet, Rule(LoRA(rank=2)))
    assert len(calls) <= LAYERS
    calls.clear()
    AdapterSet.build(unet, made).attach().detach()
    assert not calls


# -- plans and other models --------------------------------------------------------------------------------------------


def test_a_plan_serves_a_model_with_the_same_layers() -> None:
    model = net()
    with torch.device("meta"):
        made = plan(net(), Rule(LoRA(rank=2)))
    adapters = AdapterSet.build(model, made)
    assert all(site.is_in(model) for site in adapters.sites.values())


def test_a_plan_that_does_not_fit_a_model_is_refused_at_once() -> None:
    made = plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Rule(LoRA(rank=2)))
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    with pytest.raises(PlanError, match=r"made for a Sequential, does not fit: 1, .*\(4, 4\).*\(5, 4\).*1 of 2"):
        AdapterSet.build(other, made)
    with pytest.raises(PlanError, match="no layer of this Linear"):
        AdapterSet.build(nn.Linear(4, 4), made)


def test_a_layer_replaced_after_planning_gets_the_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    made = plan(model, Rule(LoRA(rank=2)))
    model[0] = nn.Linear(4, 4)
    adapters = AdapterSet.build(model, made).attach()
    assert adapters.sites["0"].module is model[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copied_plan_is_equal_and_leaves_the_model_behind(copied: object) -> None:
    model = net()
    made = plan(model, Rule(LoRA(rank=2)))
    again = copied(made)  # type: ignore[operator]
    assert again == made
    assert again.sites is None
    assert AdapterSet.build(model, again).stacks.keys() == AdapterSet.build(model, made).stacks.keys()


# -- what counts as a site ---------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)
        self.bare = nn.Module()
        self.bare.matrix = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) @ self.bare.matrix.T  # type: ignore[no-any-return]


def test_a_module_that_appears_twice_is_found_under_both_paths() -> None:
    model = Twice()
    sites = ModelSites(model)
    assert [*sites] == ["first", "bare.matrix"]
    assert sites.find("second") == sites["first"]._replace(path="second")
    assert sites["bare.matrix"].owner == "bare"
    with pytest.raises(KeyError):
        sites.find("third")


@pytest.mark.parametrize("layer", [nn.Embedding(3, 4), nn.Linear(4, 4, bias=False)])
def test_a_parametrized_layer_is_still_a_site(layer: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert "" in ModelSites(layer)


def test_adapters_are_no_sites() -> None:
    model = net()
    before = [*ModelSites(model)]
    AdapterSet.build(model, plan(model, Rule(LoRA(rank=2)))).attach()
    assert [*ModelSites(model)] == before
