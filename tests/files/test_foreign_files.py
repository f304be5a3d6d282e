"""What is in files beside adapters, and files that are none: each told for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_world import FLUX, Net, Tensors, flux

from lycoris import read
from lycoris.errors import FileError
from lycoris.files import check, convert, detect

ASIDE = {
    "OneTrainer": {"bundle_emb.word.clip_l": torch.ones(2, 768), "bundle_emb.word.t5": torch.ones(2, 4096)},
    "kohya": {"bundle_emb.word.string_to_param.*": torch.ones(2, 768)},
    "ai-toolkit": {"emb_params": torch.ones(2, 768)},
    "diffusers": {"<s0>": torch.ones(768), "text_encoders_0": torch.ones(2, 768)},
    "buffers": {"text_encoder.text_model.embeddings.position_ids": torch.arange(77)},
    "another model": {"vae.decoder.conv_in.weight": torch.ones(4, 4, 3, 3)},
    "no name": {"a_number_of_someones": torch.ones(1)},
}


@pytest.mark.parametrize("what", ASIDE)
def test_what_is_no_adapter_is_told_and_left_out(what: str, tmp_path: Path) -> None:
    save_file(flux() | ASIDE[what], tmp_path / "a.safetensors")
    found = detect(tmp_path / "a.safetensors")
    assert not found.strange
    assert any("no adapter" in remark for remark in found.remarks)
    assert check(tmp_path / "a.safetensors", "diffusers").as_trained
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya-diffusers")
    assert "no adapter" in str(done)
    assert not any(name in done.written.tensors for name in ASIDE[what])


def test_a_misspelled_adapter_is_still_an_error(tmp_path: Path) -> None:
    save_file(flux() | {f"transformer.{FLUX}.lora_dwn.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="lora_dwn"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya-diffusers")


def ones(*names: str) -> Tensors:
    return {name: torch.ones(4, 4) for name in names}


FOREIGN: dict[str, tuple[Tensors, str]] = {
    "cloneofsimo": (ones("unet:0:up", "unet:0:down", "text_encoder:0:up"), "cloneofsimo"),
    "MLX": (ones("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"), "MLX"),
    "Nunchaku": (ones("transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.mlp_fc1.lora_up"), "Nunchaku"),
    "nothing": ({}, "no tensors"),
    "SAM": (ones("w_a_000", "w_b_000"), "Segment Anything"),
    "IP-Adapter": (ones("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "IP-Adapter"),
    "VeRA": (ones("base_model.model.layers.0.q_proj.vera_lambda_b", "base_model.vera_A.default"), "another method"),
    "hypernetwork": (ones("768.0.linear.0.weight", "768.1.linear.0.weight"), "hypernetwork"),
    "LLLite": (ones("lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight"), "ControlNet-LLLite"),
    "Control-LoRA": (ones("lora_controlnet", "input_blocks.0.0.up", "input_blocks.0.0.down"), "Control-LoRA"),
    "ControlNet": (ones("control_model.input_blocks.0.0.weight"), "ControlNet"),
    "textual inversion": ({"emb_params": torch.ones(2, 768)}, "textual inversion"),
    "textual inversion of two": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "textual inversion"),
    "learned embeds": ({"<cat-toy>": torch.ones(768)}, "textual inversion"),
    "checkpoint": (ones("model.diffusion_model.out.2.weight", "first_stage_model.conv.weight"), "full weights"),
    "transformer": (
        ones("transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.bias"),
        "full weights",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_that_are_no_adapters_are_named(what: str, tmp_path: Path) -> None:
    tensors, told = FOREIGN[what]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    for look in (detect, lambda p: check(p, "comfyui"), lambda p: read(p, Net()), lambda p: convert(p, "x", "kohya")):
        with pytest.raises(FileError, match=told) as error:
            look(path)
        assert len(str(error.value).splitlines()) <= 15


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ([torch.ones(4, 2), torch.ones(2, 4)], "cloneofsimo"),
        ({"string_to_param": {"*": torch.ones(2, 768)}, "name": "word"}, "textual inversion"),
        ({"<cat-toy>": torch.ones(768)}, "textual inversion"),
    ],
)
def test_pickles_that_are_no_adapters_are_named(held: object, told: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(FileError, match=told):
        detect(tmp_path / "a.pt")
