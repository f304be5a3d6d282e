"""Keywords of sd-scripts' own network modules in `lycoris.kohya`: layers, ranks and rates by regular expressions."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from hosts import TEXT, UNET, T5EncoderModel, TextEncoder
from lycoris import ConfigError, PlanError
from lycoris.kohya import LycorisNetworkKohya, create_network, create_network_from_weights
from pipelines import Host

ALL = {*(f"lora_unet_{name}" for name in UNET), *(f"lora_te{n}_{name}" for n in (1, 2) for name in TEXT)}
ATTENTION = {f"lora_unet_down_blocks_1_attn1_to_{name}" for name in ("q", "k", "v", "out_0")}


def make(host: Host, algo: str = "lora", **args: Any) -> LycorisNetworkKohya:
    return create_network(1.0, 4, 2, None, host.encoders, host.unet, algo=algo, **args)


def names(host: Host, **args: Any) -> set[str]:
    return {module.lora_name for module in make(host, **args).loras}


def ranks(host: Host, algo: str = "lora", **args: Any) -> dict[str, int]:
    return {module.lora_name: module.algorithm.rank for module in make(host, algo, **args).loras}


@pytest.mark.parametrize("given", ["[r'.*attn1.*', '.*mlp.*']", [".*attn1.*", ".*mlp.*"], "('.*attn1.*', '.*mlp.*')"])
def test_paths_that_match_whole_are_left_out_of_every_model(given: Any, host: Host) -> None:
    without = {name for name in ALL if "attn1" not in name and "mlp" not in name}
    assert names(host, exclude_patterns=given) == without
    back = names(host, exclude_patterns=given, include_patterns=r"'.*attn1\\.to_q'")
    assert back == without | {"lora_unet_down_blocks_1_attn1_to_q"}


def test_norms_are_left_out_too(host: Host) -> None:
    every = names(host, train_norm="True")
    assert every - names(host, train_norm="True", exclude_patterns="['.*norm.*']") == {"lora_unet_down_blocks_1_norm"}


def test_expressions_without_effect_are_told(host: Host, caplog: Any) -> None:
    assert names(host, exclude_patterns="['attn1']", include_patterns="['.*nowhere.*']") == ALL
    assert names(host, network_reg_dims="ff=8,.*attn1.*=2", network_reg_lrs=r".*other.*=1e-4,.*fc\d=1e-4") == ALL
    told = [text.split(" matches")[0] for text in caplog.messages]
    assert told == [
        *("'attn1' in exclude_patterns", "'.*nowhere.*' in include_patterns"),
        *("'ff' in network_reg_dims", "'.*other.*' in network_reg_lrs"),
    ]


def test_nothing_left_says_what_left_layers_out(host: Host) -> None:
    for args in ({"exclude_patterns": "['.*']"}, {"network_reg_dims": ".*=0"}):
        with pytest.raises(PlanError, match="exclude_patterns and ranks of 0 in network_reg_dims exclude"):
            make(host, **args)
    assert names(host, exclude_patterns="['.*_proj|mlp.*']") == {
        f"lora_unet_{n}" for n in UNET if not n.endswith("_proj")
    }


def test_ranks_of_their_own(host: Host, caplog: Any) -> None:
    """The first expression that matches counts; 0 leaves out; alpha is that of linear layers, on convolutions too."""
    given = ".*to_q=6, .*attn1.*=8 ,.*ff.*=0,conv_.*=3"
    network = make(host, "loha", network_reg_dims=given, conv_dim="5", conv_alpha="7")
    found = {module.lora_name.removeprefix("lora_unet_"): module.algorithm for module in network.unet_loras}
    assert {name: algorithm.rank for name, algorithm in found.items()} == {
        name: 6
        if "to_q" in name
        else 8
        if "attn1" in name
        else 3
        if name.startswith("conv")
        else 5
        if "conv" in name
        else 4
        for name in UNET
        if "ff" not in name
    }
    assert {name: a.alpha for name, a in found.items() if a.alpha != 2} == {"down_blocks_0_conv1": 7}
    assert ranks(host, network_reg_dims={".*to_q": 6})["lora_unet_down_blocks_1_attn1_to_q"] == 6
    assert not caplog.messages
    dora = make(host, "lokr", dora_wd="True", factor="2", network_reg_dims=".*fc1=1")
    small = next(module for module in dora.loras if module.lora_name == "lora_te1_mlp_fc1")
    assert small.algorithm.inner.rank == 1
    make(host, "full", network_reg_dims=".*fc1=1")
    assert caplog.messages == ["network_reg_dims has no effect on full, which has no rank"]


def test_the_schedule_of_tlora_reaches_the_largest_rank(host: Host) -> None:
    network = make(host, "tlora", network_reg_dims=".*to_q=8", preset="attn-mlp")
    assert network.adapters.schedule.max_rank == 8


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"exclude_patterns": ".*norm.*"}, r"exclude_patterns must be a list of regular expressions in Python syntax"),
        ({"exclude_patterns": "[1]"}, "exclude_patterns must be a list of regular expressions"),
        ({"include_patterns": "['(']"}, r"include_patterns: '\(' is not a regular expression"),
        ({"network_reg_dims": r".*\d{1,2}=8"}, r"Expressions cannot contain commas"),
        ({"network_reg_dims": ".*=2.5"}, "in network_reg_dims must be a whole number"),
        ({"network_reg_dims": ".*=-1"}, "in network_reg_dims must be 0 or more"),
        ({"network_reg_dims": "[=4"}, "network_reg_dims: .* is not a regular expression"),
        ({"network_reg_lrs": ".*=fast"}, "in network_reg_lrs must be a number"),
        ({"network_reg_lrs": ".*=nan"}, "in network_reg_lrs must be 0 or more"),
        ({"verbose": "perhaps"}, "verbose must be true or false"),
    ],
)
def test_wrong_values_are_refused(args: dict[str, str], text: str, host: Host) -> None:
    with pytest.raises(ConfigError, match=text):
        make(host, **args)


def test_rates_of_their_own(host: Host) -> None:
    """Groups in the order in which their first layer comes, before the side's own; rate 0 is not trained."""
    args = {"network_reg_lrs": ".*attn1.*=5e-4,.*ff.*=0,.*conv1|.*fc1=7e-4", "loraplus_unet_lr_ratio": "4"}
    network = make(host, **args)
    groups, told = network.prepare_optimizer_params([1e-4, 1e-4], 1e-3, None)
    assert told == [
        *("textencoder reg_lr_2", "textencoder"),
        *("unet reg_lr_2", "unet reg_lr_2 plus", "unet reg_lr_0", "unet reg_lr_0 plus", "unet", "unet plus"),
    ]
    assert [group["lr"] for group in groups] == pytest.approx([7e-4, 1e-4, 7e-4, 28e-4, 5e-4, 20e-4, 1e-3, 4e-3])
    own = {id(p): module.lora_name for module in network.loras for p in module.parameters()}
    members = [{own[id(p)] for p in group["params"]} for group in groups]
    assert members[4] == members[5] == ATTENTION
    assert not any("_ff_" in name for each in members for name in each)
    assert network.prepare_optimizer_params(0, 0, None)[1] == [t for t in told if "reg_lr" in t]


def test_a_network_from_a_file_has_rates_and_says_what_the_file_decides(host: Host, caplog: Any) -> None:
    sd = make(host).state_dict()
    caplog.set_level(logging.INFO)
    args = {"network_reg_lrs": ".*attn1.*=5e-4,.*attn7.*=1", "network_reg_dims": ".*=8", "exclude_patterns": "['.*']"}
    network, _ = create_network_from_weights(1, None, None, host.encoders, host.unet, weights_sd=sd, **args)
    assert set(network.state_dict()) == set(sd)
    assert network.prepare_optimizer_params(None, 1e-3, None)[1] == ["unet reg_lr_0", "unet"]
    assert [text for text in caplog.messages if "the file decide: exclude_patterns, network_reg_dims" in text]
    assert [text for text in caplog.messages if text.startswith("'.*attn7.*' in network_reg_lrs matches")]


def test_a_class_of_networks_takes_the_same_keywords(host: Host) -> None:
    args = {"exclude_patterns": "['.*ff.*']", "network_reg_lrs": ".*to_q=5e-4", "loraplus_lr_ratio": "4"}
    network = LycorisNetworkKohya(None, host.unet, 1.0, 4, **args)
    assert not any("_ff_" in module.lora_name for module in network.loras)
    groups, _ = network.prepare_optimizer_params(None, 1e-3, None)
    assert [group["lr"] for group in groups] == pytest.approx([5e-4, 20e-4, 1e-3, 4e-3])


def test_verbose_names_each_layer(host: Host, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    make(host, verbose="True", network_reg_dims=".*fc1=2")
    assert [text for text in caplog.messages if text.startswith("lora_te2.mlp.fc1: LoRA(rank=2")]
    caplog.clear()
    make(host, verbose="False")
    assert not [text for text in caplog.messages if "mlp.fc1" in text]


@pytest.mark.parametrize(
    ("algo", "args", "marks"),
    [
        ("lora", {}, {"lora_up.weight"}),
        ("dylora", {}, {"lora_up.weight"}),
        ("lora", {"dora_wd": "True"}, {"lora_up.weight"}),
        ("loha", {}, {"hada_w2_a"}),
        ("loha", {"use_tucker": "True"}, {"hada_w2_a"}),
        ("lokr", {"factor": "2"}, {"lokr_w1"}),
        ("lokr", {"decompose_both": "True"}, {"lokr_w1", "lokr_w1_a", "lokr_w1_b"}),
    ],
)
def test_lora_plus_is_for_these_tensors(algo: str, args: dict[str, str], marks: set[str], host: Host) -> None:
    """sd-scripts goes by the names: lora_up, hada_w2_a, lokr_w1."""
    network = create_network(1.0, 1, 1, None, None, host.unet, algo=algo, loraplus_lr_ratio="16", **args)
    groups, told = network.prepare_optimizer_params(None, 1e-3, None)
    assert told == ["unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 16e-3])
    keys = {id(p): key for module in network.loras for key, p in module.named_parameters()}
    assert {keys[id(p)] for p in groups[1]["params"]} == marks
    assert not {keys[id(p)] for p in groups[0]["params"]} & marks


@pytest.mark.parametrize("algo", ["glora", "tlora", "diag-oft", "boft", "ia3", "full"])
def test_lora_plus_has_no_effect_on_others_and_says_so(algo: str, host: Host, caplog: Any) -> None:
    preset = "ia3" if algo == "ia3" else "attn-mlp"
    network = create_network(1.0, 4, 1, None, None, host.unet, algo=algo, preset=preset, loraplus_lr_ratio="16")
    caplog.clear()
    assert network.prepare_optimizer_params(None, 1e-3, None)[1] == ["unet"]
    assert caplog.messages == ["LoRA+ has no effect on unet; it is supported for LoRA, LoHa, LoKr"]


@pytest.mark.parametrize("written", ["lora_te", "lora_te1"])
@pytest.mark.parametrize("listed", [True, False])
def test_the_only_text_encoder_may_have_a_number(written: str, listed: bool, host: Host) -> None:
    """sd-scripts hands Anima's over in a list and calls it lora_te."""
    encoder: nn.Module = host.encoders[0]
    sd = create_network(1.0, 4, 1, None, encoder, host.unet).state_dict()
    sd = {key.replace("lora_te", written): torch.randn_like(t) for key, t in sd.items()}
    given = [encoder] if listed else encoder
    network, _ = create_network_from_weights(1.0, None, None, given, host.unet, weights_sd=sd)
    assert set(network.state_dict()) == set(sd)
    assert network.load_state_dict(sd).missing_keys == []


def test_one_of_two_encoders_takes_a_name_without_number_only_if_it_is_free(host: Host, caplog: Any) -> None:
    sd = make(host).state_dict()
    stray = {f"lora_te_{key.removeprefix('lora_te2_')}": t for key, t in sd.items() if key.startswith("lora_te2_")}
    network, _ = create_network_from_weights(1, None, None, host.encoders, host.unet, weights_sd=sd | stray)
    assert set(network.state_dict()) == set(sd)
    assert any("are for text encoders" in text for text in caplog.messages)
    encoders = [TextEncoder(), T5EncoderModel()]
    flux = create_network(1.0, 4, 1, None, encoders, host.unet, train_t5xxl="True").state_dict()
    old = {key.replace("lora_te3", "lora_te2"): t for key, t in flux.items()}
    network, _ = create_network_from_weights(1, None, None, encoders, host.unet, weights_sd=old)
    assert set(network.state_dict()) == set(old)
