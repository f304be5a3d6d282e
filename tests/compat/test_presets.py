"""Presets: targets for the networks made after them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import perturb, relative
from lycoris import (
    ConfigError,
    LycorisNetwork,
    PlanError,
    create_lycoris,
    create_lycoris_from_weights,
)
from networks import MyModel, names, trained


def test_a_preset_counts_for_later_networks_and_is_frozen_into_each(model: MyModel) -> None:
    before = create_lycoris(model, 1.0, linear_dim=2)
    assert LycorisNetwork.apply_preset({"target_module": ["Attention"]}) is LycorisNetwork
    during = create_lycoris(model, 1.0, linear_dim=2)
    LycorisNetwork.apply_preset({"target_module": ["FeedForward"], "lora_prefix": "mine"})
    after = create_lycoris(model, 1.0, linear_dim=2)
    assert len(names(before)) == 7
    assert names(during) == {"lycoris_blocks_0_to_q", "lycoris_blocks_0_to_out"}
    assert names(after) == {"mine_blocks_1_net_0", "mine_blocks_1_net_2"}


def test_the_class_outranks_an_apply_preset_that_is_handed_over(model: MyModel, caplog: Any) -> None:
    """Trainers change the preset before they apply it, and still hand the config over as it was."""
    LycorisNetwork.apply_preset({"target_module": ["Attention"]})
    network = create_lycoris(model, 1.0, apply_preset={"target_module": ["FeedForward"]})
    assert names(network) == {"lycoris_blocks_0_to_q", "lycoris_blocks_0_to_out"}
    assert [text for text in caplog.messages if "that of the class is used" in text]


def test_a_prefix_of_ones_own_goes_through_files(model: MyModel, x: Tensor, tmp_path: Path) -> None:
    LycorisNetwork.apply_preset({"lora_prefix": "mine"})
    network = trained(model, linear_dim=2)
    live = model(x)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    assert network.load_weights(tmp_path / "a.safetensors") == {}
    network.restore()
    again, _ = create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", model)
    again.double().apply_to()
    assert relative(model(x), live) < 1e-6


def test_a_file_with_the_usual_prefix_loads_whatever_the_preset(model: MyModel, tmp_path: Path) -> None:
    trained(model, linear_dim=2).save_weights(tmp_path / "a.safetensors", None, {})
    LycorisNetwork.apply_preset({"lora_prefix": "mine", "target_module": ["Attention"]})
    again, _ = create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", MyModel())
    assert len(again.loras) == 7


def test_keys_that_are_given_are_replaced_and_the_others_stay() -> None:
    LycorisNetwork.apply_preset({"target_module": ["Attention"], "exclude_name": ["blocks.0.to_q"]})
    LycorisNetwork.apply_preset({"exclude_name": []})
    assert names(create_lycoris(MyModel(), 1.0)) == {"lycoris_blocks_0_to_q", "lycoris_blocks_0_to_out"}


def test_unknown_preset_key_is_a_key_error_naming_the_nearest() -> None:
    with pytest.raises(KeyError, match=r"'target_modules'.*did you mean 'target_module'") as caught:
        LycorisNetwork.apply_preset({"target_modules": ["Attention"]})
    assert isinstance(caught.value, ConfigError)
    assert LycorisNetwork.build_preset() is None
    with pytest.raises(ConfigError, match=r"target_module.*list"):
        LycorisNetwork.apply_preset({"target_module": "Attention"})


def test_the_root_class_as_target(model: MyModel, x: Tensor) -> None:
    network = trained(model, linear_dim=2, apply_preset={"target_module": ["MyModel"]})
    assert len(names(network)) == 7
    assert not [name for name in names(network) if "__" in name]
    assert "lycoris_blocks_0_to_q" in names(network)


def test_a_bare_layer_as_the_model(tmp_path: Path) -> None:
    layer, x = nn.Linear(6, 4).double(), torch.randn(2, 6, dtype=torch.float64)
    network = trained(layer, linear_dim=2)
    live = layer(x)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.restore()
    create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", layer)[0].double().apply_to()
    assert relative(layer(x), live) < 1e-6


def test_names_inside_a_targeted_block_count(model: MyModel) -> None:
    preset = {"target_module": ["Attention"], "name_algo_map": {"blocks.0.to_q": {"algo": "lokr", "factor": 2}}}
    network = create_lycoris(model, 1.0, linear_dim=2, apply_preset=preset)
    assert [adapter.algorithm.name for adapter in network.loras] == ["lokr", "lora"]


def test_exclude_name_wins(model: MyModel) -> None:
    preset = {"target_module": ["Attention"], "target_name": ["head"], "exclude_name": ["blocks.0.to_q", "he"]}
    assert names(create_lycoris(model, 1.0, apply_preset=preset)) == {"lycoris_blocks_0_to_out"}


@pytest.mark.parametrize(
    ("pattern", "globs", "hit"),
    [
        ("blocks.0", False, 2),
        ("to_q", False, 0),
        (r".*\.to_q$", False, 1),
        ("blocks.*.to_?", True, 1),
        ("blocks.0", True, 0),
        ("blocks.*", True, 4),
    ],
)
def test_regular_expressions_and_globs(pattern: str, globs: bool, hit: int, model: MyModel) -> None:
    preset = {"target_module": [], "target_name": [pattern], "use_fnmatch": globs}
    if hit:
        assert len(create_lycoris(model, 1.0, apply_preset=preset).loras) == hit
    else:
        with pytest.raises(PlanError, match=pattern):
            create_lycoris(model, 1.0, apply_preset=preset)


def test_enable_conv_false_is_honoured(model: MyModel) -> None:
    LycorisNetwork.apply_preset({"enable_conv": False})
    found = names(create_lycoris(model, 1.0))
    assert "lycoris_conv_in" not in found
    assert {"lycoris_skip", "lycoris_head"} <= found


def test_convolutions_have_sizes_of_their_own(model: MyModel) -> None:
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, conv_dim=3, conv_alpha=1.5)
    sizes = {
        path: (stack[0].algorithm.rank, stack[0].algorithm.alpha) for path, stack in network.adapters.stacks.items()
    }
    assert sizes["conv_in"] == (3, 1.5)
    assert sizes["skip"] == sizes["head"] == (4, 2.0)


def test_nothing_warns(model: MyModel, config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, **config)


def test_networks_made_before_any_is_applied_stack_and_come_back_in_any_order() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    before = model(x)
    one, two = (create_lycoris(model, algorithm="lora", rank=2) for _ in range(2))
    for network in (one, two):
        perturb(network.adapters)
        network.apply_to()
    both = model(x)
    one.restore()
    alone = model(x)
    one.apply_to()
    assert relative(model(x), both) < 1e-5
    one.restore()
    assert torch.equal(model(x), alone)
    two.restore()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("on_class", [True, False])
def test_a_preset_file_counts_before_what_apply_preset_was_given(
    on_class: bool, model: MyModel, tmp_path: Path
) -> None:
    """As in lycoris-lora, which applies it to the class after that, key by key."""
    (tmp_path / "a.toml").write_text('target_module = ["Attention"]\n')
    preset = {"target_module": ["FeedForward"], "exclude_name": [r"blocks\.0\.to_out"]}
    options = {} if on_class else {"apply_preset": preset}
    if on_class:
        LycorisNetwork.apply_preset(preset)
    network = create_lycoris(model, 1.0, preset=str(tmp_path / "a.toml"), **options)
    assert names(network) == {"lycoris_blocks_0_to_q"}
