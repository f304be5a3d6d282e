"""Which layers the networks of `lycoris.kohya` mean, and what these are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hosts import TEXT, UNET, Transformer, block
from lycoris import ConfigError, LycorisNetwork, PlanError
from lycoris.kohya import LycorisNetworkKohya, create_network
from lycoris.models import outline
from pipelines import ARGS, Host
from tiny import sdxl_unet

SUFFIXES = {
    "lora": {"lora_up.weight", "lora_down.weight", "alpha"},
    "lora-dora": {"lora_up.weight", "lora_down.weight", "alpha", "dora_scale"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    "lokr-whole": {"lokr_w1", "lokr_w2", "alpha"},
    "dylora": {"lora_up.weight", "lora_down.weight", "alpha"},
    "glora": {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"},
    "diag-oft": {"oft_blocks", "rescale", "alpha"},
    "boft": {"oft_blocks", "alpha"},
}
"""What lycoris-lora 4.1.3 writes for each layer."""
LAYERS = {
    "full": set(UNET.values()),
    "full-lin": {"time", "resnet", "transformer", "attention"},
    "attn-mlp": {"time", "transformer", "attention"},
    "attn-only": {"attention"},
    "unet-only": set(UNET.values()),
    "unet-transformer-only": {"time", "transformer", "attention"},
    "unet-convblock-only": {"conv", "resnet"},
}
TOLD = {"full": TEXT, "full-lin": TEXT, "attn-mlp": TEXT, "attn-only": TEXT[:4]}


@pytest.mark.parametrize("preset", LAYERS)
def test_names_of_the_presets(preset: str, host: Host) -> None:
    network = create_network(1.0, 4, 1, None, host.encoders, host.unet, preset=preset)
    wanted = {f"lora_unet_{name}" for name, part in UNET.items() if part in LAYERS[preset]}
    if preset == "unet-convblock-only":
        wanted -= {"lora_unet_time_embedding_linear_1", "lora_unet_time_embedding_linear_2"}
    wanted |= {f"lora_te{n}_{name}" for n in (1, 2) for name in TOLD.get(preset, ())}
    assert {module.lora_name for module in network.loras} == wanted
    assert {key.split(".")[0] for key in network.state_dict()} == wanted


@pytest.mark.parametrize("name", SUFFIXES)
def test_tensors_of_each_layer(name: str, host: Host) -> None:
    network = create_network(1.0, 4, 1, None, host.encoders[0], host.unet, **ARGS[name])
    tensors: dict[str, set[str]] = {}
    for key in network.state_dict():
        tensors.setdefault(key.split(".")[0], set()).add(key.partition(".")[2])
    assert all(found == SUFFIXES[name] for found in tensors.values())
    assert {layer for layer in tensors if layer.startswith("lora_te_")} == {f"lora_te_{layer}" for layer in TEXT}


def test_ia3_preset_has_the_layers_of_its_paper(host: Host) -> None:
    network = create_network(1.0, None, None, None, host.encoders[0], host.unet, algo="ia3", preset="ia3")
    on_input = {module.lora_name: module.algorithm.on_input for module in network.loras}
    assert on_input == {
        "lora_unet_down_blocks_1_attn1_to_k": False,
        "lora_unet_down_blocks_1_attn1_to_v": False,
        "lora_unet_down_blocks_1_ff_net_2": True,
        "lora_te_self_attn_k_proj": False,
        "lora_te_self_attn_v_proj": False,
        "lora_te_mlp_fc2": True,
    }


@pytest.mark.parametrize("preset", ["full", "full-lin", "unet-only"])
def test_a_layer_that_is_meant_twice_is_adapted_once(preset: str) -> None:
    """Stable Diffusion's time embedding is in these presets by its class and by its layers' paths."""
    network = create_network(1.0, 4, 1, None, None, sdxl_unet(), preset=preset)
    names = [module.lora_name for module in network.loras]
    assert len(names) == len(set(names))
    assert "lora_unet_time_embedding_linear_1" in names


FAMILIES = {
    "sd-1.5": 0,
    "flux.1-dev": 6,
    "flux.2-klein-4b": 7,
    "wan2.1-t2v-1.3b": 5,
    "hunyuanvideo-1.5": 11,
    "lumina2": 4,
}
"""How many layers outside of blocks the preset full leaves alone in diffusers' own classes."""


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_presets_reach_the_blocks_of_diffusers(name: str) -> None:
    model = outline.load_model(name)
    layers = sum(isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) for module in model.modules())
    assert len(create_network(1.0, 4, 1, None, None, model).loras) == layers - FAMILIES[name]
    assert len(create_network(1.0, 4, 1, None, None, model, preset="attn-only").loras) > layers / 3


def test_conv_dim_zero_leaves_convolutions_out(host: Host) -> None:
    names = {m.lora_name for m in create_network(1.0, 4, 1, None, None, host.unet, conv_dim="0").loras}
    assert names == {f"lora_unet_{name}" for name, part in UNET.items() if part != "conv"}


def test_presets_from_files(host: Host, tmp_path: Path, caplog: Any) -> None:
    given = {"enable_conv": False, "unet_target_module": ["FeedForward", "Nowhere"], "text_encoder_target_module": []}
    (tmp_path / "a.json").write_text(json.dumps(given | {"exclude_name": [".*net.2"]}))
    (tmp_path / "a.toml").write_text('unet_target_module = ["Attention"]\nunet_target_name = ["other"]\n')
    network = create_network(1.0, 4, 1, None, host.encoders, host.unet, preset=str(tmp_path / "a.json"))
    assert [m.lora_name for m in network.loras] == ["lora_unet_down_blocks_1_ff_net_0"]
    assert caplog.messages == [
        "'Nowhere' matches no layer of UNet that adapters can serve (convolutions with a real kernel are off)"
    ]
    network = create_network(1.0, 4, 1, None, None, host.unet, preset=str(tmp_path / "a.toml"))
    assert {m.lora_name for m in network.loras} == {
        "lora_unet_other",
        *(f"lora_unet_{name}" for name, part in UNET.items() if part == "attention"),
    }
    with pytest.raises(ConfigError, match=r"neither a built-in preset nor a file.*attn-mlp"):
        create_network(1.0, 4, 1, None, None, host.unet, preset="attn_mlp")


def test_no_preset_leaks_into_the_next_network(host: Host) -> None:
    whole = len(create_network(1.0, 4, 1, None, host.encoders, host.unet).loras)
    LycorisNetwork.apply_preset({"target_module": ["Attention"], "enable_conv": False})
    assert len(create_network(1.0, 4, 1, None, host.encoders, host.unet, preset="unet-convblock-only").loras) == 4
    assert len(create_network(1.0, 4, 1, None, host.encoders, host.unet).loras) == whole
    LycorisNetworkKohya.apply_preset({"unet_target_module": ["FeedForward"], "unet_target_name": []})
    assert len(create_network(1.0, 4, 1, None, None, host.unet).loras) == 2
    assert len(create_network(1.0, 4, 1, None, None, host.unet, preset="full").loras) == len(UNET)
    with pytest.raises(KeyError, match="did you mean 'unet_target_module'"):
        LycorisNetworkKohya.apply_preset({"unet_target_modul": []})


def test_models_without_any_target_are_an_error(host: Host) -> None:
    with pytest.raises(PlanError, match=r"no layer of Sequential matches the targets"):
        create_network(1.0, 4, 1, None, None, nn.Sequential(nn.Linear(2, 2)))
    assert len(create_network(1.0, 4, 1, None, host.encoders, nn.Sequential(nn.Linear(2, 2))).loras) == 12


def test_the_language_adapter_is_trained_only_when_asked_for() -> None:
    model = Transformer(block("Block", ["mlp"]), block("LLMAdapterTransformerBlock", ["q"]))
    plain = create_network(1.0, 4, 1, None, None, model)
    assert [m.lora_name for m in plain.loras] == ["lora_unet_blocks_0_mlp"]
    whole = create_network(1.0, 4, 1, None, None, model, train_llm_adapter="True")
    assert [m.lora_name for m in whole.loras] == ["lora_unet_blocks_0_mlp", "lora_unet_blocks_1_q"]


def test_norms_of_the_targets_are_trained_when_asked_for(host: Host) -> None:
    network = create_network(1.0, 4, 1, None, None, host.unet, train_norm="True")
    assert set(network.state_dict()) >= {f"lora_unet_down_blocks_1_norm.{n}_norm" for n in ("w", "b")}
    assert len(network.loras) == len(UNET) + 1


def test_targets_are_said_once(host: Host) -> None:
    wanted = {"unet_target_module": ["FeedForward"], "unet_target_name": []}
    given = create_network(1.0, 4, 1, None, None, host.unet, apply_preset=wanted)
    assert len(given.loras) == 2
    with pytest.raises(ConfigError, match=r"preset='full' and apply_preset both select"):
        create_network(1.0, 4, 1, None, None, host.unet, apply_preset=wanted, preset="full")
