"""What scripts assign acts, or says what to do instead."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import relative
from lycoris import ConfigError, LycorisNetwork, create_lycoris, create_lycoris_from_weights
from lycoris.compat.musubi import loha
from lycoris.kohya import create_network, create_network_from_weights
from lycoris.modules import MODULE_LIST, DiagOFTModule, LoConModule, LokrModule, NormModule
from networks import MyModel, trained
from pipelines import Host

SETTINGS = (
    "alpha",
    "scale",
    "lora_dim",
    "dropout",
    "rank_dropout",
    "module_dropout",
    "rank_dropout_scale",
    "wd",
    "drop",
)
FACTS = ("shape", "dim", "op", "kw_dict", "module", "module_type", "org_module", "org_forward", "dtype", "device")


def made(cls: Any) -> Any:
    return cls("name", nn.LayerNorm(8) if cls is NormModule else nn.Linear(8, 8))


class TestModules:
    @pytest.mark.parametrize("cls", MODULE_LIST, ids=lambda cls: cls.__name__)
    @pytest.mark.parametrize("name", [*SETTINGS, *FACTS])
    def test_what_a_module_is_cannot_be_assigned(self, cls: Any, name: str) -> None:
        module = made(cls)
        with pytest.raises(ConfigError, match=name):
            setattr(module, name, 3)

    @pytest.mark.parametrize(
        "write",
        [
            lambda t: t.fill_(2.0),
            lambda t: t.data.fill_(2.0),
            lambda t: t.detach().mul_(2.0),
            lambda t: t.copy_(torch.tensor(2.0)),
            lambda t: t.add_(1),
            lambda t: t.__setitem__((), 2.0),
            lambda t: setattr(t, "data", torch.tensor(2.0)),
            lambda t: t.view(1).zero_(),
            lambda t: torch.add(torch.tensor(1.0), 1.0, out=t),
            lambda t: nn.init.constant_(t, 2.0),
        ],
    )
    def test_settings_that_are_read_as_tensors_cannot_be_written(self, write: Any) -> None:
        module = made(LoConModule)
        for name in ("alpha", "scalar"):
            with pytest.raises(ConfigError, match=f"writing to {name} would have no effect"):
                write(getattr(module, name))
        assert (float(module.alpha), float(module.scalar)) == (1.0, 1.0)

    def test_they_are_tensors_otherwise(self) -> None:
        module = made(LoConModule)
        assert type(module.alpha * 2) is type(module.alpha.clone()) is Tensor
        assert (module.alpha * 2).item() == 2
        assert torch.equal(module.alpha.clone().fill_(3), torch.tensor(3.0))
        assert type(copy.deepcopy(module.alpha)) is type(pickle.loads(pickle.dumps(module.alpha))) is Tensor

    def test_a_gate_that_is_trained_is_written(self) -> None:
        module = LoConModule("name", nn.Linear(8, 8), use_scalar=True)
        with torch.no_grad():
            module.scalar.fill_(0.5)
        assert float(module.adapter.tensors()["scalar"].detach()) == 0.5

    def test_tensors_act(self) -> None:
        layer, x = nn.Linear(8, 8), torch.randn(2, 8)
        module = LoConModule("name", layer, 1.0, 4, 4.0)
        module.apply_to()
        before = layer(x)
        module.lora_up = nn.Linear(4, 8)
        assert not torch.allclose(layer(x), before)
        with torch.no_grad():
            module.lora_up.weight.zero_()
        assert torch.equal(layer(x), before)
        module.multiplier = 0.5
        module.bypass_mode = True
        assert (module.multiplier, module.bypass_mode) == (0.5, True)
        module.mark_of_my_own = 3
        assert module.mark_of_my_own == 3

    def test_the_layer_is_not_changed_through_the_list_of_it(self) -> None:
        with pytest.raises(ConfigError, match="changing this list would have no effect"):
            made(LokrModule).org_module[0] = nn.Linear(8, 8)

    def test_a_subclass_with_tensors_of_its_own(self) -> None:
        """As trainers do that take a class and not its start."""

        class Own(LoConModule):
            def __init__(self) -> None:
                nn.Module.__init__(self)
                self.lora_name, self.lora_dim, self.scale, self.shape = "own", 4, 0.5, (8, 8)
                self.alpha, self.lora_down = torch.tensor(2.0), nn.Linear(8, 4)

        own = Own()
        assert (own.lora_dim, own.scale, own.shape, float(own.alpha)) == (4, 0.5, (8, 8), 2.0)

    def test_facts(self) -> None:
        layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(1, 4, 5, 5)
        module = LokrModule("name", layer, 1.0, 2, 1.0)
        assert (module.module_type, module.op, module.module) == ("conv2d", nn.functional.conv2d, nn.Conv2d)
        assert torch.equal(module.op(x, layer.weight, layer.bias, **module.kw_dict), module.org_forward(x))
        assert DiagOFTModule("name", layer, 1.0, 2, constraint=0.5).constraint == 3.0


class TestNetworks:
    def test_the_multiplier_acts(self, model: MyModel, x: Tensor) -> None:
        base = model(x)
        network = trained(model, linear_dim=2)
        network.multiplier = 0
        assert torch.equal(model(x), base)
        network.multiplier = "0.5"
        assert {module.multiplier for module in network.loras} == {0.5}

    @pytest.mark.parametrize("name", ["loras", "lora_dim", "alpha", "dropout", "use_tucker", "weights_sd", "prefix"])
    def test_what_a_network_is_cannot_be_assigned(self, name: str, model: MyModel) -> None:
        network = create_lycoris(model, 1.0, 2, 1.0)
        with pytest.raises(ConfigError, match=f"assigning to {name} of a LycorisNetwork would have no effect"):
            setattr(network, name, [])

    @pytest.mark.parametrize(
        "change",
        [
            lambda these: these.clear(),
            lambda these: these.sort(),
            lambda these: these.append(1),
            lambda these: these.pop(),
            lambda these: these.__setitem__(0, 1),
        ],
    )
    def test_its_list_cannot_be_changed(self, change: Any, model: MyModel) -> None:
        network = create_lycoris(model, 1.0, 2, 1.0)
        with pytest.raises(ConfigError, match="exclude_name"):
            change(network.loras)
        assert type(copy.copy(network.loras)) is list
        assert len(network.loras) == 7

    def test_what_it_was_made_with_is_read(self, model: MyModel, host: Host) -> None:
        network = create_lycoris(model, 1.0, 2, 3.0, conv_dim=4, dropout=0.25, use_tucker=True)
        read = (network.lora_dim, network.alpha, network.conv_lora_dim, network.conv_alpha, network.dropout)
        assert read == (2, 3.0, 4, 3.0, 0.25)
        assert network.use_tucker
        again, _ = create_lycoris_from_weights(1.0, None, MyModel(), network.state_dict())
        assert again.lora_dim == 0

    def test_ratios_act(self, host: Host) -> None:
        network = create_network(1.0, 2, 1.0, None, host.encoders, host.unet)
        network.loraplus_unet_lr_ratio = 16
        groups, told = network.prepare_optimizer_params(1e-4, 1e-4, None)
        assert {name: group["lr"] for name, group in zip(told, groups, strict=True)}["unet plus"] == 16e-4
        with pytest.raises(ConfigError, match="train_t5xxl"):
            network.train_t5xxl = True
        with pytest.raises(ConfigError, match="unet_loras"):
            network.unet_loras = []

    def test_patterns(self, model: MyModel) -> None:
        LycorisNetwork.apply_preset({"exclude_name": ["blocks"], "name_algo_map": {"head": {"algo": "lokr"}}})
        network = create_lycoris(model, 1.0)
        assert network.is_excluded("blocks.0.to_q")
        assert not network.is_excluded("head")
        assert network.is_excluded("head", ["he.d"])
        assert network.find_conf_for_name("head") == {"algo": "lokr"}
        assert network.find_conf_for_name("skip") is None
        assert network.match_fn("bl", "blocks")


class TestDropout:
    @pytest.mark.parametrize("given", [{"dropout": 0.5}, {"rank_dropout": "0.5"}, {"module_dropout": 0.5}])
    def test_it_counts_beside_a_file(self, given: dict[str, Any], model: MyModel, host: Host) -> None:
        (name,) = given
        network, _ = create_lycoris_from_weights(1.0, None, model, create_lycoris(model, 1.0).state_dict(), **given)
        assert {getattr(module, name) for module in network.loras} == {0.5}
        tensors = create_network(1.0, 2, 1.0, None, host.encoders, host.unet, dora_wd=True).state_dict()
        kohya, _ = create_network_from_weights(1.0, None, None, host.encoders, host.unet, weights_sd=tensors, **given)
        assert {getattr(module, name) for module in kohya.loras} == {0.5}
        assert all(torch.equal(kohya.state_dict()[key], tensor) for key, tensor in tensors.items())

    def test_the_one_of_trainers_counts(self, host: Host) -> None:
        network = create_network(1.0, 2, 1.0, None, host.encoders, host.unet, neuron_dropout=0.25)
        assert {module.dropout for module in network.loras} == {0.25}
        network = create_network(1.0, 2, 1.0, None, host.encoders, host.unet, neuron_dropout=0.25, dropout="0.5")
        assert {module.dropout for module in network.loras} == {0.5}

    def test_what_a_file_decides_is_said(self, model: MyModel, caplog: Any) -> None:
        caplog.set_level(logging.INFO, "LyCORIS")
        tensors = create_lycoris(model, 1.0, algo="ia3").state_dict()
        create_lycoris_from_weights(1.0, None, model, tensors, factor=8, dropout=0.5)
        assert [
            text for text in caplog.messages if "have no effect, since the tensors of the file decide: factor" in text
        ]
        assert [text for text in caplog.messages if text == "ia3 has no dropout"]


class TestStrengthGivenTwice:
    def test_once_and_only_where_both_count(self, model: MyModel, caplog: Any) -> None:
        tensors = trained(MyModel().double(), linear_dim=2).state_dict()
        for strength, weight, times in ((0.5, 0.5, 1), (1.0, 0.5, 0), (0.5, 1.0, 0)):
            caplog.clear()
            network, _ = create_lycoris_from_weights(strength, None, model, tensors)
            for _ in range(2):
                network.merge_to(weight)
                network.restore()
                network.onfly_merge(weight)
                network.onfly_restore()
            assert len([text for text in caplog.messages if "times the multiplier" in text]) == times

    def test_single_modules(self, caplog: Any) -> None:
        module = LoConModule("name", nn.Linear(8, 8), 0.5, 2, 1.0)
        for _ in range(2):
            module.merge_to(0.5)
            module.restore()
        assert len([text for text in caplog.messages if "times the multiplier" in text]) == 1


def test_musubi_remembers_the_multipliers_of_single_modules() -> None:
    class WanAttentionBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    model, x = nn.Sequential(WanAttentionBlock()), torch.randn(2, 8)
    network = loha.create_arch_network(1.0, 2, 1.0, None, None, model)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network.apply_to(None, model, False, True)
    network.loras[0].multiplier = 0.25
    live = model[0].q(x)
    network.set_enabled(False)
    network.set_enabled(False)
    assert {module.multiplier for module in network.loras} == {0.0}
    network.set_enabled(True)
    assert [module.multiplier for module in network.loras] == [0.25, 1.0]
    assert relative(model[0].q(x), live) == 0
    network.set_enabled(False)
    network.set_multiplier(0.5)
    assert {module.multiplier for module in network.loras} == {0.0}
    network.set_enabled(True)
    assert {module.multiplier for module in network.loras} == {0.5}
