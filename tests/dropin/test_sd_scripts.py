"""sd-scripts' side of `lycoris.kohya`: its calls, in its order, with its strings."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from cases import perturb, relative
from hosts import TEXT, UNET, T5EncoderModel, TextEncoder, Transformer, UNet, block
from lycoris import AttachError, ConfigError, FileError, LycorisNetwork, PlanError, outline
from lycoris.files import load_tensors
from lycoris.kohya import LycorisNetworkKohya, create_network, create_network_from_weights
from tiny import clip_config, sdxl_unet

ARGS: dict[str, dict[str, str]] = {
    "lora": {"algo": "lora"},
    "locon": {"algo": "locon", "conv_dim": "2", "conv_alpha": "1", "use_tucker": "True"},
    "lora-scalar": {"algo": "lora", "use_scalar": "True"},
    "lora-dora": {"algo": "lora", "dora_wd": "True"},
    "loha": {"algo": "loha"},
    "loha-scalar": {"algo": "loha", "use_scalar": "True"},
    "lokr": {"algo": "lokr", "factor": "4"},
    "lokr-scalar": {"algo": "lokr", "use_scalar": "True"},
    "lokr-whole": {"algo": "lokr", "full_matrix": "True"},
    "full": {"algo": "full"},
    "dylora": {"algo": "dylora", "block_size": "2"},
    "glora": {"algo": "glora"},
    "diag-oft": {"algo": "diag-oft", "constraint": "0.1", "rescaled": "True"},
    "boft": {"algo": "boft"},
    "ia3": {"algo": "ia3", "preset": "ia3"},
    "tlora": {"algo": "tlora"},
}
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


class Host:
    """A UNet and two text encoders in double precision, and what they give."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.unet, self.encoders = UNet().double().eval(), [TextEncoder().double().eval() for _ in range(2)]
        for model in (self.unet, *self.encoders):
            model.requires_grad_(False)
        self.x, self.ids = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 9, (2, 5))

    def __call__(self) -> Tensor:
        return torch.cat([m.flatten() for m in (self.unet(self.x), *(te(self.ids) for te in self.encoders))])


@pytest.fixture
def host() -> Host:
    return Host()


def made(host: Host, name: str = "lora", multiplier: float = 1.0, **more: Any) -> LycorisNetworkKohya:
    """A network with random tensors, not applied."""
    args = {"dropout": None, "neuron_dropout": None} | ARGS[name] | more
    network = create_network(multiplier, 4, 2, None, host.encoders, host.unet, **args).double()
    for part in network.parts:
        perturb(part.adapters, 0.2)
    return network


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.parametrize("name", ARGS)
def test_a_training_run(name: str, host: Host, tmp_path: Path) -> None:
    """train_network.py, from --network_module to the saved file, and a second run with --network_weights."""
    base = host()
    args = {"neuron_dropout": None, "dropout": None, **ARGS[name]}
    network = create_network(1.0, 4, 2.0, None, host.encoders, host.unet, **args)
    network.apply_to(host.encoders, host.unet, True, True)
    assert network.train_t5xxl is False
    assert torch.equal(host(), base)
    network.enable_gradient_checkpointing()
    groups, told = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 1e-2, 1e-3)
    assert told == ["textencoder", "unet"]
    optimizer = torch.optim.SGD(groups, lr=1e-2)
    network.to(torch.float64)
    network.prepare_grad_etc(host.encoders, host.unet)
    for _ in range(2):
        network.on_epoch_start(host.encoders, host.unet)
        network.on_step_start(host.encoders, host.unet)
        optimizer.zero_grad()
        host().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        count, mean, largest = network.apply_max_norm_regularization(10.0, "cpu")
        assert 0 <= count <= len(network.loras)
        assert 0 <= mean <= largest <= 10.0
    network.set_multiplier(0.0)
    assert torch.equal(host(), base)
    network.set_multiplier(1.0)
    network.eval()
    live = host()
    assert relative(live, base) > 1e-6
    network.save_weights(tmp_path / "a.safetensors", torch.float64, {"ss_network_module": "lycoris.kohya"})

    second = Host()
    resumed = create_network(1.0, 4, 2.0, None, second.encoders, second.unet, **args)
    resumed.apply_to(second.encoders, second.unet, True, True)
    assert resumed.load_weights(tmp_path / "a.safetensors") == {}
    resumed.to(torch.float64)
    resumed.load_weights(tmp_path / "a.safetensors")
    assert relative(second(), live) < 1e-6


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
@pytest.mark.parametrize("name", ARGS)
def test_live_merged_and_made_again_are_one(name: str, multiplier: float, host: Host, tmp_path: Path) -> None:
    """--base_weights with --base_weights_multiplier, and gen_img.py with and without merging."""
    base = host()
    network = made(host, name, multiplier)
    network.apply_to(host.encoders, host.unet)
    live = host()
    assert relative(live, base) > 1e-3
    path = tmp_path / "a.safetensors"
    network.save_weights(path, torch.float64, {})
    network.onfly_merge()
    assert relative(host(), live) < 1e-10
    network.onfly_restore()
    assert torch.equal(host(), live)
    network.restore()
    assert torch.equal(host(), base)

    merged = Host()
    module, sd = create_network_from_weights(multiplier, path, None, merged.encoders, merged.unet, for_inference=True)
    assert module.is_mergeable()
    module.merge_to(merged.encoders, merged.unet, sd, torch.bfloat16, "cpu")
    assert relative(merged(), live) < 2e-4
    applied = Host()
    module, sd = create_network_from_weights(multiplier, str(path), None, applied.encoders, applied.unet)
    module.to(torch.float64)
    module.apply_to(applied.encoders, applied.unet)
    module.load_state_dict(sd, False)
    assert relative(applied(), live) < 1e-6


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


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_reach_the_blocks_of_diffusers(name: str) -> None:
    model = outline.known(name)
    layers = sum(isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) for module in model.modules())
    assert len(create_network(1.0, 4, 1, None, None, model).loras) == layers - FAMILIES[name]
    assert len(create_network(1.0, 4, 1, None, None, model, preset="attn-only").loras) > layers / 3


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


@pytest.mark.parametrize("name", ["lora", "loha-scalar", "lokr", "boft"])
def test_a_real_video_transformer(name: str, tmp_path: Path) -> None:
    model = wan_transformer().eval().requires_grad_(False)
    inputs = torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.randn(1, 3, 16)
    base = model(*inputs)[0]
    network = create_network(0.6, 12, 3, None, None, model, preset="attn-mlp", **ARGS[name])
    blocks = [module for module in network.loras if "_blocks_" in module.lora_name]
    assert len(blocks) == 2 * (8 + 2)
    network.apply_to(None, model, False, True)
    assert torch.equal(model(*inputs)[0], base)
    perturb(network.adapters, 0.2)
    live = model(*inputs)[0]
    assert relative(live, base) > 1e-3
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.restore()
    again, sd = create_network_from_weights(0.6, tmp_path / "a.safetensors", None, None, model, for_inference=True)
    again.merge_to(None, model, sd, None, "cpu")
    assert relative(model(*inputs)[0], live) < 2e-4


def test_every_value_may_be_a_string_or_none(host: Host) -> None:
    options = {"conv_dim": None, "conv_alpha": None, "module_dropout": "0.1", "rank_dropout": "", "use_tucker": "False"}
    options["rank_dropout"] = "0.0"
    network = create_network("0.5", "8", "4", None, None, host.unet, algo="LoRA", dropout="0.2", **options)
    algorithm = network.loras[0].algorithm
    assert (network.multiplier, algorithm.rank, algorithm.alpha, algorithm.dropout) == (0.5, 8, 4.0, 0.2)
    plain = create_network(1.0, None, None, None, None, host.unet, algo=None, dropout=None).loras[0]
    assert (plain.algorithm.rank, plain.scale) == (4, 1.0)


def test_conv_dim_zero_leaves_convolutions_out(host: Host) -> None:
    names = {m.lora_name for m in create_network(1.0, 4, 1, None, None, host.unet, conv_dim="0").loras}
    assert names == {f"lora_unet_{name}" for name, part in UNET.items() if part != "conv"}


def test_unknown_and_renamed_keywords_are_told(host: Host, caplog: Any) -> None:
    create_network(1.0, 4, 1, None, host.encoders, host.unet, algo="diag-oft", constrain="0.5", facter="3")
    assert sum("facter" in text and "did you mean 'factor'" in text for text in caplog.messages) == 1
    assert "constrain is called constraint now" in caplog.messages
    assert len(caplog.messages) == 2
    loud = create_network(1.0, 4, 1, None, None, host.unet, algo="locon", disable_conv_cp="False")
    assert next(m for m in loud.loras if m.lora_name.endswith("conv1")).algorithm.tucker


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
    with pytest.raises(PlanError, match=r"no layer of Sequential is meant"):
        create_network(1.0, 4, 1, None, None, nn.Sequential(nn.Linear(2, 2)))
    assert len(create_network(1.0, 4, 1, None, host.encoders, nn.Sequential(nn.Linear(2, 2))).loras) == 12


def test_flux_calls_its_t5_the_third_text_encoder(host: Host, tmp_path: Path, caplog: Any) -> None:
    encoders = [host.encoders[0], T5EncoderModel()]
    plain = create_network(1.0, 4, 1, None, encoders, host.unet)
    assert not plain.train_t5xxl
    assert {m.lora_name.split("_")[1] for m in plain.text_encoder_loras} == {"te1"}
    network = create_network(1.0, 4, 1, None, encoders, host.unet, train_t5xxl="True")
    assert network.train_t5xxl
    assert [m.lora_name for m in network.text_encoder_loras if "te1" not in m.lora_name] == ["lora_te3_block_q"]
    sd = {key.replace("lora_te3", "lora_te2"): tensor for key, tensor in network.state_dict().items()}
    other, _ = create_network_from_weights(1.0, None, None, encoders, host.unet, weights_sd=sd)
    assert {m.lora_name.split("_")[1] for m in other.text_encoder_loras} == {"te1", "te2"}


def test_names_of_real_text_encoders(tmp_path: Path) -> None:
    """Readers look for `text_model`, which transformers 5 took out of one of the two classes."""
    encoders = [CLIPTextModel(clip_config()), CLIPTextModelWithProjection(clip_config())]
    network = create_network(1.0, 4, 1, None, encoders, sdxl_unet())
    names = {module.lora_name for module in network.text_encoder_loras}
    for number in (1, 2):
        assert f"lora_te{number}_text_model_encoder_layers_0_self_attn_k_proj" in names
    assert all("_text_model_encoder_layers_" in name for name in names)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    again, _ = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, encoders, sdxl_unet())
    assert len(again.loras) == len(network.loras)
    sd = {key.replace("te1_text_model", "te1"): tensor for key, tensor in network.state_dict().items()}
    without, _ = create_network_from_weights(1.0, None, None, encoders, sdxl_unet(), weights_sd=sd)
    assert set(without.state_dict()) == set(sd)


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


def test_one_side_of_a_pipeline(host: Host, tmp_path: Path) -> None:
    network = made(host)
    network.apply_to(host.encoders, host.unet, False, True)
    assert network.text_encoder_loras == []
    assert not any(key.startswith("lora_te") for key in network.state_dict())
    assert {id(p) for p in network.parameters()} == {id(p) for m in network.unet_loras for p in m.parameters()}
    assert network.prepare_optimizer_params(1e-4, 1e-4)[1] == ["unet"]
    assert torch.equal(host.encoders[0](host.ids), Host().encoders[0](host.ids))


def test_tensors_of_absent_text_encoders_are_told_and_others_refused(host: Host, tmp_path: Path, caplog: Any) -> None:
    sd = made(host).state_dict()
    network, _ = create_network_from_weights(1.0, None, None, None, host.unet, weights_sd=sd)
    assert len(network.loras) == len(UNET)
    assert [text for text in caplog.messages if "are for text encoders" in text]
    strange = {key.replace("conv_in", "conv_inn"): tensor for key, tensor in sd.items()}
    with pytest.raises(FileError, match=r"conv_inn is like conv_in"):
        create_network_from_weights(1.0, None, None, host.encoders, host.unet, weights_sd=strange)
    with pytest.raises(FileError, match=r"lycoris_x\.alpha.*create_lycoris_from_weights"):
        create_network_from_weights(1.0, None, None, None, host.unet, weights_sd={"lycoris_x.alpha": torch.tensor(1.0)})
    with pytest.raises(FileError, match="neither"):
        create_network_from_weights(1.0, None, None, None, host.unet)


def test_learning_rates(host: Host, caplog: Any) -> None:
    network = made(host, loraplus_lr_ratio="4", loraplus_unet_lr_ratio="16")
    groups, told = network.prepare_optimizer_params(1e-4, 1e-3, None)
    assert told == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 4e-4, 1e-3, 16e-3])
    assert [len(list(group["params"])) for group in groups] == [12, 12, len(UNET), len(UNET)]
    assert network.prepare_optimizer_params(0, None, 1e-3)[1] == ["unet", "unet plus"]
    assert network.prepare_optimizer_params(None, None, None) == ([], [])
    assert network.prepare_optimizer_params(None, 0, 1e-3)[1] == ["textencoder", "textencoder plus"]
    groups, told = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 2e-4], 1e-3, None)
    assert told[:4] == ["textencoder 1", "textencoder 1 plus", "textencoder 2", "textencoder 2 plus"]
    assert [group["lr"] for group in groups[:4]] == pytest.approx([1e-4, 4e-4, 2e-4, 8e-4])
    assert not caplog.messages
    lokr = made(host, "lokr", loraplus_lr_ratio="4")
    assert lokr.prepare_optimizer_params(1e-4, 1e-4)[1] == ["textencoder", "unet"]
    assert [text for text in caplog.messages if "LoRA+ has no effect" in text]


@pytest.mark.parametrize("name", ["lora", "lora-scalar", "loha-scalar", "lokr", "lokr-whole", "dylora", "diag-oft"])
def test_max_norm_is_what_the_layer_then_has(name: str, host: Host) -> None:
    network = made(host, name)
    norms = [module.apply_max_norm(1e9)[1] for module in network.loras]
    limit = sorted(norms)[len(norms) // 2]
    count, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert count == sum(norm > limit for norm in norms) > 0
    assert largest == pytest.approx(limit)
    assert mean == pytest.approx(sum(min(norm, limit) for norm in norms) / len(norms))
    if name != "diag-oft":
        deltas = [float(module.get_diff_weight()[0].detach().norm()) for module in network.loras]
        assert deltas == pytest.approx([min(norm, limit) for norm in norms])
    assert network.apply_max_norm_regularization(limit * 1.001, "cpu")[0] == 0


def test_saved_files_carry_hashes_and_metadata(host: Host, tmp_path: Path) -> None:
    network = made(host)
    network.save_weights(tmp_path / "a.safetensors", torch.float16, {"ss_epoch": "1", "modelspec.title": "x"})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert len(metadata["sshs_legacy_hash"]) == 8
    assert (metadata["ss_epoch"], metadata["modelspec.title"]) == ("1", "x")
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {torch.float16}
    assert set(tensors) == set(network.state_dict())
    with pytest.raises(FileError, match="safetensors"):
        network.save_weights(tmp_path / "a.ckpt", None, {})


def test_accelerate_saves_and_loads_a_network_as_a_model(host: Host) -> None:
    network = made(host)
    network.apply_to(host.encoders, host.unet)
    live, state = host(), {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for part in network.parts:
        perturb(part.adapters)
    assert relative(host(), live) > 1e-3
    network.load_state_dict(state)
    assert relative(host(), live) < 1e-6
    assert isinstance(network, LycorisNetwork)


def test_a_merge_for_inference_keeps_no_copy_of_the_weights(host: Host) -> None:
    network = made(host)
    network.apply_to(host.encoders, host.unet)
    live, sd, weight = host().detach(), network.state_dict(), weakref.ref(host.unet.conv_in.weight)
    network.restore()
    network, sd = create_network_from_weights(
        1.0, None, None, host.encoders, host.unet, weights_sd=sd, for_inference=True
    )
    network.merge_to(host.encoders, host.unet, sd, None, "cpu")
    gc.collect()
    assert weight() is None
    assert relative(host(), live) < 1e-6
    assert type(host.unet.conv_in) is nn.Conv2d
    with pytest.raises(AttachError, match="for good"):
        network.restore()


def test_utils_merge_and_back(host: Host) -> None:
    from lycoris.utils import merge

    base, network = host(), made(host)
    network.set_multiplier(0.7)
    network.apply_to(host.encoders, host.unet)
    live, sd = host(), network.state_dict()
    network.restore()
    done = merge(host.encoders, host.unet, sd, 0.7)
    assert relative(host(), live) < 1e-6
    done.restore()
    assert torch.equal(host(), base)
    single = {key.replace("lora_te1", "lora_te"): t for key, t in sd.items() if "lora_te2" not in key}
    assert len(merge([host.encoders[0]], host.unet, single).loras) == len(UNET) + len(TEXT)


def test_tlora_masks_reach_the_denoiser_alone(host: Host) -> None:
    from lycoris.modules.tlora import clear_timestep_mask, set_timestep_mask

    network = made(host, "tlora")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    network.apply_to(host.encoders, host.unet)
    whole, told = host.unet(host.x), host.encoders[0](host.ids)
    set_timestep_mask(torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0]]))
    assert relative(host.unet(host.x), whole) > 1e-3
    assert torch.equal(host.encoders[0](host.ids), told)
    clear_timestep_mask()
    assert torch.equal(host.unet(host.x), whole)
