"""Files of `lycoris.kohya`: written, and read into other networks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from cases import perturb, relative
from hosts import UNET, T5EncoderModel, Transformer, block
from lycoris import ConfigError, FileError, LycorisNetwork
from lycoris.files import load_tensors, save_tensors
from lycoris.files.dialects.history import SCALES_KEY
from lycoris.files.writing import STALE_KEYS
from lycoris.kohya import create_network, create_network_from_weights
from pipelines import Host, made, sd_scripts_header
from tiny import clip_config, sdxl_unet


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


def test_hashes_are_those_that_sd_scripts_computes(tmp_path: Path) -> None:
    """`precalculate_safetensors_hashes`, and what readers hash of the file; the second begins at a MiB."""
    model = Transformer(block("Transformer2DModel", ["a"]))
    model.blocks[0].a = nn.Linear(640, 640)
    network = create_network(1.0, 4, 1, None, None, model, algo="full")
    perturb(network.adapters)
    path, metadata = tmp_path / "a.safetensors", {"ss_epoch": "1", "modelspec.title": "x"}
    network.save_weights(path, None, metadata)
    tensors, header = load_tensors(path)
    as_trained = save(tensors, {"ss_epoch": "1"})
    assert len(as_trained) > 0x110000
    assert header["sshs_legacy_hash"] == hashlib.sha256(as_trained[0x100000:0x110000]).hexdigest()[:8]
    raw = path.read_bytes()
    behind = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(behind).hexdigest()


def test_a_header_is_that_of_every_other_file(tmp_path: Path) -> None:
    """What is stale goes, and what `lycoris.write` says of every file is there."""
    unet, path = sdxl_unet(), tmp_path / "a.safetensors"
    create_network(1.0, 4, 2, None, None, unet).save_weights(path, None, sd_scripts_header("lora"))
    tensors, header = load_tensors(path)
    save_tensors(tensors, path, header | {key: "{}" for key in STALE_KEYS if key != SCALES_KEY})
    again, _ = create_network_from_weights(1.0, path, None, None, unet)
    again.save_weights(tmp_path / "b.safetensors", None, {"ss_epoch": "2"})
    _, found = load_tensors(tmp_path / "b.safetensors")
    assert found == header | {"ss_epoch": "2"} | {key: found[key] for key in ("sshs_model_hash", "sshs_legacy_hash")}
    assert "{}" not in found.values()
    assert (found["lycoris_family"], json.loads(found["lycoris_scale"])) == ("sdxl", {"*": 0.5})
    assert "UNet2DConditionModel" in found["lycoris_base"]


def test_two_models_of_one_name_are_refused(host: Host) -> None:
    encoders = [host.encoders[0], T5EncoderModel(), host.encoders[1]]
    with pytest.raises(ConfigError, match=r"have the same prefix lora_te3"):
        create_network(1.0, 4, 1, None, encoders, host.unet, train_t5xxl=True)


def of_lycoris_4(host: Host, path: Path) -> dict[str, Tensor]:
    """A DyLoRA's file as lycoris-lora 4.1.3 writes it: alpha lacks the size of the blocks, and the header tells."""
    tensors = made(host, "dylora").float().state_dict()
    save_tensors(tensors, path, sd_scripts_header("dylora"))
    return tensors


def test_the_header_says_what_tensors_mean_whenever_they_are_loaded(host: Host, tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "a.safetensors"
    raw = of_lycoris_4(host, path)
    network, sd = create_network_from_weights(1.0, path, None, host.encoders, host.unet)
    assert {module.scale for module in network.loras} == {2 * 2 / 4}
    assert [text for text in caplog.messages if "its DyLoRA was trained at 2 times the stored scale" in text]
    network.apply_to(host.encoders, host.unet)
    live = host()
    for load in (lambda: network.load_weights(path), lambda: network.load_state_dict(sd, False)):
        for part in network.parts:
            perturb(part.adapters)
        load()
        assert torch.equal(host(), live)
    assert network.load_weights(path) == {}
    assert sd.keys() == raw.keys()


def test_settings_for_training_reach_a_network_made_from_a_file(host: Host) -> None:
    """train_network.py --dim_from_weights."""
    encoders = [host.encoders[0], T5EncoderModel()]
    sd = create_network(1.0, 4, 1, None, encoders, host.unet, train_t5xxl="True").state_dict()
    options = {"loraplus_lr_ratio": "4", "train_t5xxl": "True", "dropout": None, "bypass_mode": "True"}
    network, _ = create_network_from_weights("0.5", None, None, encoders, host.unet, weights_sd=sd, **options)
    assert (network.multiplier, network.train_t5xxl, network.loras[0].bypass_mode) == (0.5, True, True)
    groups, told = network.prepare_optimizer_params("1e-4", "1e-3", None)
    assert told == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 4e-4, 1e-3, 4e-3])


def test_a_bias_beside_an_adapter_is_one_of_its_side(host: Host) -> None:
    network = made(host)
    sd = network.state_dict() | {"lora_unet_other.diff_b": torch.randn(8), "lora_te1_mlp_fc1.diff_b": torch.randn(16)}
    network, _ = create_network_from_weights(1.0, None, None, host.encoders, host.unet, weights_sd=sd)
    assert len(network.unet_loras) == len(UNET) + 1
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 2e-4], 1e-3, None)
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in network.parameters())
    network.apply_to(host.encoders, host.unet, False, True)
    assert not any(name.startswith("lora_te") for name, _ in network.named_parameters())
    assert set(network.state_dict()) == {key for key in sd if key.startswith("lora_unet")}


@pytest.mark.parametrize("sd", [{}, {"lycoris_conv_in.alpha": torch.tensor(1.0)}])
def test_a_merge_of_tensors_of_no_side_is_refused(sd: dict[str, Tensor], host: Host) -> None:
    base, network = host(), made(host)
    with pytest.raises(FileError, match=r"in weights_sd starts with lora_unet or lora_te"):
        network.merge_to(host.encoders, host.unet, sd)
    assert torch.equal(host(), base)
    assert len(network.unet_loras) == len(UNET)


def test_a_network_is_never_left_without_adapters(host: Host) -> None:
    network = create_network(1.0, 4, 1, None, None, host.unet)
    for call in (
        lambda: network.apply_to(host.encoders, host.unet, True, False),
        lambda: network.merge_to(None, host.unet, {"lora_te_x.alpha": torch.tensor(1.0)}),
    ):
        with pytest.raises(ConfigError, match=r"adapters only for lora_unet, and those for text encoders"):
            call()
    assert len(network.loras) == len(UNET)


def test_files_of_sd_scripts_own_oft_call_the_denoiser_otherwise(host: Host) -> None:
    """networks.oft: W' = RᵀW by blocks of rows, R of Q = B - Bᵀ, ‖Q‖ at most alpha times the outputs."""
    blocks, alpha = 0.3 * torch.randn(2, 8, 8), 0.05
    name = "oft_unet_down_blocks_1_attn1_to_q"
    sd = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(alpha)}
    layer = host.unet.down_blocks[1].attn1.to_q
    q = (blocks - blocks.mT).double()
    q = q * min(1.0, alpha * 16 / float(q.norm()))
    eye = torch.eye(8, dtype=torch.float64)
    rotated = torch.einsum("knm,knp->kmp", (eye + q) @ (eye - q).inverse(), layer.weight.reshape(2, 8, 8)).reshape(
        16, 8
    )
    network, tensors = create_network_from_weights(1.0, None, None, host.encoders, host.unet, sd, for_inference=True)
    assert set(network.state_dict()) == set(sd)
    network.merge_to(host.encoders, host.unet, tensors)
    assert relative(layer.weight, rotated) < 1e-5
