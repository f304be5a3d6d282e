"""The preset of a class of networks by its class attributes: read, assigned, changed in place, inherited."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lycoris import ConfigError, LycorisNetwork, create_lycoris, create_lycoris_from_weights
from lycoris.kohya import LycorisNetworkKohya, create_network
from networks import MyModel, names
from pipelines import Host

ATTENTION = {"lycoris_blocks_0_to_q", "lycoris_blocks_0_to_out"}
FEED_FORWARD = {"lycoris_blocks_1_net_0", "lycoris_blocks_1_net_2"}


def test_what_counts_is_read(model: MyModel) -> None:
    assert "Linear" in LycorisNetwork.TARGET_REPLACE_MODULE
    assert (LycorisNetwork.LORA_PREFIX, LycorisNetwork.ENABLE_CONV, LycorisNetwork.USE_FNMATCH) == (
        "lycoris",
        True,
        False,
    )
    LycorisNetwork.apply_preset({"target_module": ["Attention"], "lora_prefix": "mine"})
    assert LycorisNetwork.TARGET_REPLACE_MODULE == ["Attention"]
    assert create_lycoris(model, 1.0).LORA_PREFIX == "mine"
    LycorisNetwork.clear_preset()
    assert names(create_lycoris(model, 1.0)) > ATTENTION | FEED_FORWARD


def test_reading_changes_nothing(model: MyModel) -> None:
    for name in ("TARGET_REPLACE_MODULE", "TARGET_EXCLUDE_NAME", "NAME_ALGO_MAP", "ENABLE_CONV", "LORA_PREFIX"):
        getattr(LycorisNetwork, name)
    assert LycorisNetwork.build_preset() is None
    assert len(names(create_lycoris(model, 1.0))) == 7


def test_assigning_acts_on_later_networks(model: MyModel) -> None:
    before = create_lycoris(model, 1.0)
    LycorisNetwork.TARGET_REPLACE_MODULE = ["Attention"]
    assert names(create_lycoris(model, 1.0)) == ATTENTION
    LycorisNetwork.TARGET_REPLACE_NAME = ["head"]
    LycorisNetwork.LORA_PREFIX = "mine"
    LycorisNetwork.TARGET_EXCLUDE_NAME = ["blocks.0.to_q"]
    assert names(create_lycoris(model, 1.0)) == {"mine_blocks_0_to_out", "mine_head"}
    assert len(names(before)) == 7


def test_maps_and_convolutions(model: MyModel) -> None:
    LycorisNetwork.MODULE_ALGO_MAP = {"Attention": {"algo": "loha"}}
    LycorisNetwork.NAME_ALGO_MAP = {"head": {"algo": "lokr"}}
    LycorisNetwork.ENABLE_CONV = False
    network = create_lycoris(model, 1.0, 2, 1.0)
    found = {module.lora_name: type(module).__name__ for module in network.loras}
    assert found["lycoris_blocks_0_to_q"] == "LohaModule"
    assert found["lycoris_head"] == "LokrModule"
    assert "lycoris_conv_in" not in found
    LycorisNetwork.MODULE_ALGO_MAP["Attention"]["algo"] = "glora"
    assert "GLoRAModule" in {type(module).__name__ for module in create_lycoris(model, 1.0).loras}


def test_globs_may_be_assigned_before_they_are_turned_on(model: MyModel) -> None:
    LycorisNetwork.TARGET_REPLACE_MODULE = []
    LycorisNetwork.TARGET_REPLACE_NAME = ["*.to_q"]
    with pytest.raises(ConfigError, match="regular expression"):
        create_lycoris(model, 1.0)
    LycorisNetwork.USE_FNMATCH = True
    assert names(create_lycoris(model, 1.0)) == {"lycoris_blocks_0_to_q"}


def test_changes_in_place_act(model: MyModel) -> None:
    LycorisNetwork.TARGET_REPLACE_MODULE.clear()
    LycorisNetwork.TARGET_REPLACE_MODULE.append("Attention")
    LycorisNetwork.TARGET_REPLACE_MODULE += ["FeedForward"]
    assert names(create_lycoris(model, 1.0)) == ATTENTION | FEED_FORWARD
    mine = ["Attention"]
    LycorisNetwork.TARGET_REPLACE_MODULE = mine
    mine.append("FeedForward")
    assert names(create_lycoris(model, 1.0)) == ATTENTION | FEED_FORWARD
    LycorisNetwork.TARGET_REPLACE_MODULE.append(3)
    with pytest.raises(ConfigError, match="target_module"):
        create_lycoris(model, 1.0)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("TARGET_REPLACE_MODULES", ["Attention"], "did you mean TARGET_REPLACE_MODULE?"),
        ("ENABLE_CONVS", False, "did you mean ENABLE_CONV?"),
        ("SOMETHING", 1, "Its settings are ENABLE_CONV"),
        ("target_module", ["Attention"], "the class attribute is TARGET_REPLACE_MODULE"),
        ("UNET_TARGET_REPLACE_MODULE", ["Attention"], "LycorisNetworkKohya has; here it is TARGET_REPLACE_MODULE"),
        ("TARGET_REPLACE_MODULE", "Attention", "must be a list of names"),
        ("ENABLE_CONV", "no", "must be true or false"),
    ],
)
def test_what_would_do_nothing_is_refused(name: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        setattr(LycorisNetwork, name, value)
    assert LycorisNetwork.build_preset() is None


def test_other_class_attributes_are_free() -> None:
    LycorisNetwork.some_mark = 3
    assert LycorisNetwork.some_mark == 3
    del LycorisNetwork.some_mark


def test_a_made_network_keeps_its_layers(model: MyModel) -> None:
    network = create_lycoris(model, 1.0)
    with pytest.raises(ConfigError, match=r"assign to LycorisNetwork\.TARGET_REPLACE_MODULE"):
        network.TARGET_REPLACE_MODULE = ["Attention"]


def test_deleting_takes_an_assignment_back(model: MyModel) -> None:
    LycorisNetwork.TARGET_REPLACE_MODULE = ["Attention"]
    del LycorisNetwork.TARGET_REPLACE_MODULE
    assert len(names(create_lycoris(model, 1.0))) == 7


def test_subclasses_inherit_and_do_not_leak(model: MyModel) -> None:
    class Own(LycorisNetwork):
        TARGET_REPLACE_MODULE = ["Attention"]  # noqa: RUF012
        MARK = 12

    class Inner(Own):
        pass

    assert Inner.TARGET_REPLACE_MODULE == ["Attention"]
    Inner.TARGET_REPLACE_MODULE.append("FeedForward")
    Inner.LORA_PREFIX = "inner"
    assert Own.TARGET_REPLACE_MODULE == ["Attention"]
    assert (Own.LORA_PREFIX, Own.MARK) == ("lycoris", 12)
    assert LycorisNetwork.build_preset() is None
    assert names(Own(model, 1.0, 4)) == ATTENTION
    assert len(names(Inner(model, 1.0, 4))) == 4
    assert len(names(create_lycoris(model, 1.0))) == 7
    Own.TARGET_REPLACE_NAME = ["head"]
    assert Inner.TARGET_REPLACE_NAME == ["head"]
    LycorisNetwork.TARGET_EXCLUDE_NAME = ["head"]
    assert (Own.TARGET_EXCLUDE_NAME, Inner.TARGET_EXCLUDE_NAME) == (["head"], ["head"])


def test_a_subclass_that_does_without_our_start() -> None:
    """As a trainer does that makes its own modules."""

    class Special(LycorisNetwork):
        UNET_TARGET_REPLACE_MODULE = ["Block"]  # noqa: RUF012

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.multiplier, self.lora_dim, self.dropout = 0.5, 4, None
            self.unet_loras, self.text_encoder_loras = [nn.Linear(2, 2)], []

    made = Special()
    assert (made.multiplier, made.lora_dim, len(made.unet_loras)) == (0.5, 4, 1)


def test_the_constructor_of_the_class(model: MyModel) -> None:
    network = LycorisNetwork(model, 0.5, 2, 3, 1.0, 2.0, network_module="loha", dropout=0.1)
    assert (network.multiplier, network.lora_dim, network.conv_lora_dim, network.alpha) == (0.5, 2, 3, 1.0)
    assert {type(module).__name__ for module in network.loras} == {"LohaModule"}
    assert {module.dropout for module in network.loras} == {0.1}
    assert "lycoris_conv_in" not in names(LycorisNetwork(model, 1.0, 2, 0))
    with pytest.raises(ConfigError, match="create_lycoris_from_weights"):
        LycorisNetwork(model, init_only=True)


def test_prefixes_of_a_class_go_through_files(model: MyModel) -> None:
    LycorisNetwork.LORA_PREFIX = "mine"
    network = create_lycoris(model, 1.0, 2, 1.0)
    again, _ = create_lycoris_from_weights(1.0, None, MyModel(), network.state_dict())
    assert names(again) == names(network)


class TestKohya:
    def test_the_default_is_that_of_full(self, host: Host) -> None:
        assert "Transformer2DModel" in LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE
        assert "CLIPMLP" in LycorisNetworkKohya.TEXT_ENCODER_TARGET_REPLACE_MODULE
        assert LycorisNetworkKohya.UNET_TARGET_REPLACE_NAME[0] == "conv_in"

    def test_assigning_acts_beside_a_preset_by_name(self, host: Host, caplog: Any) -> None:
        LycorisNetworkKohya.TARGET_EXCLUDE_NAME = [".*"]
        LycorisNetworkKohya.UNET_TARGET_REPLACE_MODULE = ["Strange"]
        with pytest.raises(ConfigError.__mro__[1], match="no layer"):
            create_network(1.0, 2, 1.0, None, host.encoders, host.unet, preset="full")
        assert [text for text in caplog.messages if "overrides unet_target_module, which the class" in text]

    def test_it_has_nothing_from_networks_over_one_model(self, host: Host) -> None:
        LycorisNetwork.TARGET_EXCLUDE_NAME = [".*"]
        assert LycorisNetworkKohya.TARGET_EXCLUDE_NAME == []
        assert create_network(1.0, 2, 1.0, None, host.encoders, host.unet).loras

    def test_prefixes(self, host: Host, monkeypatch: Any) -> None:
        monkeypatch.setattr(LycorisNetworkKohya, "LORA_PREFIX_UNET", "lora_transformer")
        network = create_network(1.0, 2, 1.0, None, None, host.unet)
        assert all(name.startswith("lora_transformer_") for name in names(network))

    def test_its_constructor(self, host: Host) -> None:
        network = LycorisNetworkKohya(host.encoders, host.unet, 0.5, 2, 2, 1.0, 1.0, network_module="lokr")
        assert network.text_encoder_loras
        assert network.unet_loras
        assert (network.multiplier, network.lora_dim) == (0.5, 2)

        class Own(LycorisNetworkKohya):
            UNET_TARGET_REPLACE_NAME = []  # noqa: RUF012
            UNET_TARGET_REPLACE_MODULE = ["Nothing"]  # noqa: RUF012

        assert not Own(host.encoders, host.unet).unet_loras
