"""How each dialect calls the layers of each family: names that other programs are known to read, written out."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from lycoris import DoRA, LoKr, LoRA
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Entry
from lycoris.errors import FileError
from lycoris.files import compose, resolve
from lycoris.files.layout import NamedLayout
from lycoris.models.families import FAMILIES

UP = ".lora_up.weight"
EXPECTED = [
    # family, component, known model, layer in diffusers, dialect, how the layer is called there
    ("sd1.5", "", "sd-1.5", "mid_block.attentions.0.proj_in", "lycoris", "lycoris_mid_block_attentions_0_proj_in"),
    ("sd1.5", "", "sd-1.5", "mid_block.attentions.0.proj_in", "kohya", "lora_unet_mid_block_attentions_0_proj_in"),
    ("sd1.5", "", "sd-1.5", "mid_block.attentions.0.proj_in", "comfyui", "diffusion_model.middle_block.1.proj_in"),
    ("sd1.5", "", "sd-1.5", "mid_block.attentions.0.proj_in", "diffusers", "unet.mid_block.attentions.0.proj_in"),
    (
        "sdxl",
        "",
        "sdxl",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "kohya",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    ("sdxl", "", "sdxl", "down_blocks.1.resnets.0.conv1", "kohya", "lora_unet_input_blocks_4_0_in_layers_2"),
    ("sdxl", "", "sdxl", "down_blocks.1.resnets.0.time_emb_proj", "kohya", "lora_unet_input_blocks_4_0_emb_layers_1"),
    ("sdxl", "", "sdxl", "down_blocks.0.downsamplers.0.conv", "kohya", "lora_unet_input_blocks_3_0_op"),
    ("sdxl", "", "sdxl", "up_blocks.0.upsamplers.0.conv", "kohya", "lora_unet_output_blocks_2_2_conv"),
    (
        "sdxl",
        "",
        "sdxl",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "kohya-diffusers",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    ),
    (
        "sd1.5",
        "text_encoder",
        "clip-l",
        "encoder.layers.0.self_attn.q_proj",
        "kohya",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    ),
    (
        "sdxl",
        "text_encoder_2",
        "clip-bigg",
        "text_model.encoder.layers.31.mlp.fc1",
        "kohya",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1",
    ),
    (
        "sdxl",
        "text_encoder",
        "clip-l",
        "encoder.layers.0.mlp.fc2",
        "comfyui",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2",
    ),
    (
        "flux1",
        "text_encoder_2",
        "t5-xxl",
        "encoder.block.0.layer.0.SelfAttention.q",
        "kohya",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    ),
    (
        "flux1",
        "text_encoder_2",
        "t5-xxl",
        "encoder.block.0.layer.0.SelfAttention.q",
        "comfyui",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ),
    (
        "sd3",
        "text_encoder_3",
        "t5-xxl",
        "encoder.block.0.layer.0.SelfAttention.q",
        "kohya",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    ),
    ("sd3", "", "sd3-medium", "transformer_blocks.3.attn.to_q", "kohya", "lora_unet_joint_blocks_3_x_block_attn_qkv"),
    (
        "sd3",
        "",
        "sd3-medium",
        "transformer_blocks.3.ff_context.net.2",
        "comfyui",
        "diffusion_model.joint_blocks.3.context_block.mlp.fc2",
    ),
    ("flux1", "", "flux.1-dev", "transformer_blocks.7.attn.to_k", "kohya", "lora_unet_double_blocks_7_img_attn_qkv"),
    ("flux1", "", "flux.1-dev", "transformer_blocks.7.ff.net.0.proj", "musubi", "lora_unet_double_blocks_7_img_mlp_0"),
    (
        "flux1",
        "",
        "flux.1-dev",
        "single_transformer_blocks.37.proj_mlp",
        "comfyui",
        "diffusion_model.single_blocks.37.linear1",
    ),
    ("flux1", "", "flux.1-dev", "norm_out.linear", "comfyui", "diffusion_model.final_layer.adaLN_modulation.1"),
    (
        "flux1",
        "",
        "flux.1-dev",
        "transformer_blocks.7.attn.to_k",
        "diffusers",
        "transformer.transformer_blocks.7.attn.to_k",
    ),
    (
        "flux1",
        "",
        "flux.1-dev",
        "transformer_blocks.7.attn.to_k",
        "ai-toolkit",
        "transformer.transformer_blocks.7.attn.to_k",
    ),
    (
        "flux1",
        "",
        "flux.1-dev",
        "transformer_blocks.7.attn.to_k",
        "onetrainer-original",
        "double_blocks.7.img_attn.qkv",
    ),
    (
        "flux1",
        "",
        "flux.1-dev",
        "transformer_blocks.7.attn.to_k",
        "onetrainer-legacy",
        "lora_transformer_transformer_blocks_7_attn_to_k",
    ),
    (
        "sdxl",
        "",
        "sdxl",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "processors",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
    ),
    (
        "flux2",
        "",
        "flux.2-dev",
        "transformer_blocks.0.ff.linear_in",
        "kohya",
        "lora_unet_double_blocks_0_img_mlp_0",
    ),
    (
        "flux2",
        "",
        "flux.2-dev",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "comfyui",
        "diffusion_model.single_blocks.0.linear1",
    ),
    (
        "qwen-image",
        "",
        "qwen-image",
        "transformer_blocks.0.img_mod.1",
        "kohya",
        "lora_unet_transformer_blocks_0_img_mod_1",
    ),
    ("z-image", "", "z-image", "layers.0.attention.to_q", "kohya", "lora_unet_layers_0_attention_to_q"),
    ("z-image", "", "z-image", "layers.0.attention.to_q", "comfyui", "diffusion_model.layers.0.attention.qkv"),
    ("wan", "", "wan2.1-t2v-14b", "blocks.0.attn1.to_q", "kohya", "lora_unet_blocks_0_self_attn_q"),
    ("wan", "", "wan2.1-t2v-14b", "blocks.0.attn2.to_out.0", "musubi-other", "diffusion_model.blocks.0.cross_attn.o"),
    ("wan", "transformer_2", "wan2.1-t2v-14b", "blocks.0.ffn.net.2", "diffusers", "transformer_2.blocks.0.ffn.net.2"),
    (
        "hunyuanvideo",
        "",
        "hunyuanvideo",
        "transformer_blocks.0.attn.to_q",
        "musubi",
        "lora_unet_double_blocks_0_img_attn_qkv",
    ),
    (
        "hunyuanvideo",
        "",
        "hunyuanvideo",
        "transformer_blocks.0.attn.to_q",
        "comfyui",
        "diffusion_model.double_blocks.0.img_attn.qkv",
    ),
    (
        "hunyuanvideo-1.5",
        "",
        "hunyuanvideo-1.5",
        "transformer_blocks.0.attn.to_q",
        "musubi",
        "lora_unet_double_blocks_0_img_attn_q",
    ),
    (
        "framepack",
        "",
        "framepack-i2v",
        "transformer_blocks.0.attn.to_q",
        "musubi",
        "lora_unet_transformer_blocks_0_attn_to_q",
    ),
    ("lumina2", "", "lumina2", "layers.0.attn.to_k", "comfyui", "diffusion_model.layers.0.attention.qkv"),
    ("lumina2", "", "lumina2", "layers.0.feed_forward.linear_1", "kohya", "lora_unet_layers_0_feed_forward_w1"),
    # Beside UNets, whose names are diffusers' own there.
    (
        "sdxl",
        "",
        "sdxl",
        "mid_block.attentions.0.proj_in",
        "onetrainer-legacy",
        "lora_unet_mid_block_attentions_0_proj_in",
    ),
    (
        "flux1",
        "",
        "flux.1-dev",
        "transformer_blocks.7.attn.to_k",
        "onetrainer-legacy",
        "lora_transformer_transformer_blocks_7_attn_to_k",
    ),
    (
        "sd1.5",
        "text_encoder",
        "clip-l",
        "encoder.layers.0.mlp.fc1",
        "diffusers",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
    (
        "sdxl",
        "text_encoder",
        "clip-l",
        "encoder.layers.0.mlp.fc1",
        "onetrainer-diffusers",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
    (
        "lumina2",
        "text_encoder",
        "gemma2-2b",
        "model.layers.0.self_attn.q_proj",
        "kohya",
        "lora_te_layers_0_self_attn_q_proj",
    ),
    (
        "lumina2",
        "text_encoder",
        "gemma2-2b",
        "model.layers.0.self_attn.q_proj",
        "comfyui",
        "text_encoders.gemma2_2b.transformer.model.layers.0.self_attn.q_proj",
    ),
    (
        "wan",
        "text_encoder",
        "t5-xxl",
        "encoder.block.0.layer.0.SelfAttention.q",
        "comfyui",
        "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ),
    (
        "z-image",
        "text_encoder",
        "qwen3-8b",
        "model.layers.0.self_attn.q_proj",
        "comfyui",
        "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj",
    ),
    (
        "hunyuanvideo",
        "text_encoder",
        "llama-3.1-8b",
        "model.layers.0.self_attn.q_proj",
        "comfyui",
        "text_encoders.llama.transformer.model.layers.0.self_attn.q_proj",
    ),
    (
        "chroma",
        "",
        "chroma1-hd",
        "single_transformer_blocks.1.proj_out",
        "comfyui",
        "diffusion_model.single_blocks.1.linear2",
    ),
    (
        "flux3",
        "",
        "flux.3",
        "mode_blocks.image.1.attn.to_q",
        "comfyui",
        "diffusion_model.content_mode_blocks.image.1.q_proj",
    ),
    (
        "qwen-image-2.1",
        "",
        "qwen-image-2.1",
        "transformer_blocks.1.attn.to_q",
        "comfyui",
        "diffusion_model.transformer_blocks.1.attn.to_q",
    ),
    (
        "auraflow",
        "",
        "auraflow",
        "joint_transformer_blocks.1.attn.to_q",
        "comfyui",
        "diffusion_model.double_layers.1.attn.w2q",
    ),
    (
        "pixart",
        "",
        "pixart-alpha",
        "transformer_blocks.1.attn2.to_q",
        "comfyui",
        "diffusion_model.blocks.1.cross_attn.q_linear",
    ),
    (
        "sana",
        "",
        "sana-1600m",
        "transformer_blocks.1.attn2.to_q",
        "diffusers",
        "transformer.transformer_blocks.1.attn2.to_q",
    ),
    (
        "hidream-i1",
        "",
        "hidream-i1",
        "double_stream_blocks.1.block.attn1.to_q_t",
        "comfyui",
        "diffusion_model.double_stream_blocks.1.block.attn1.to_q_t",
    ),
    (
        "hunyuanimage",
        "",
        "hunyuanimage-2.1",
        "transformer_blocks.1.attn.to_out.0",
        "comfyui",
        "diffusion_model.double_blocks.1.img_attn.proj",
    ),
    ("ideogram4", "", "ideogram-4", "layers.1.attention.to_out.0", "comfyui", "diffusion_model.layers.1.attention.o"),
    ("krea2", "", "krea-2", "transformer_blocks.1.attn.to_q", "comfyui", "diffusion_model.blocks.1.attn.wq"),
    (
        "ernie-image",
        "",
        "ernie-image",
        "layers.1.self_attention.to_q",
        "comfyui",
        "diffusion_model.layers.1.self_attention.to_q",
    ),
    (
        "cosmos-predict2",
        "",
        "cosmos-predict2-2b",
        "transformer_blocks.1.attn1.to_q",
        "comfyui",
        "diffusion_model.blocks.1.self_attn.q_proj",
    ),
    (
        "ltx-video",
        "",
        "ltx-video-2b",
        "transformer_blocks.1.attn1.to_q",
        "comfyui",
        "diffusion_model.transformer_blocks.1.attn1.to_q",
    ),
    (
        "ltx-2",
        "",
        "ltx-2",
        "transformer_blocks.1.audio_attn1.to_q",
        "comfyui",
        "diffusion_model.transformer_blocks.1.audio_attn1.to_q",
    ),
    ("mochi", "", "mochi-1", "transformer_blocks.1.attn1.to_out.0", "comfyui", "diffusion_model.blocks.1.attn.proj_x"),
    (
        "kandinsky5",
        "",
        "kandinsky5-lite-video",
        "visual_transformer_blocks.1.cross_attention.to_query",
        "comfyui",
        "diffusion_model.visual_transformer_blocks.1.cross_attention.to_query",
    ),
    (
        "minimax-h3",
        "",
        "minimax-h3",
        "transformer_blocks.1.attn.to_out.0",
        "comfyui",
        "diffusion_model.blocks.1.attn.out_proj",
    ),
]


@pytest.mark.parametrize(("family", "component", "model", "layer", "dialect", "name"), EXPECTED)
def test_names(family: str, component: str, model: str, layer: str, dialect: str, name: str) -> None:
    from lycoris.models.families import ARCHITECTURES

    where = NamedLayout.from_outline(ARCHITECTURES[FAMILIES[family].components[component]], model)
    geometry = where.layers[layer]
    algorithm = LoRA(rank=2)
    tensors = {slot: torch.ones(what.shape) for slot, what in algorithm.slots(geometry).items()}
    bundle = Bundle({layer: (Entry(algorithm, geometry, tensors),)})
    written = compose(bundle, dialect, component=component, model=where, family=family)
    layers = {key.removesuffix(".weight").rpartition(".")[0] for key in written.tensors}
    assert layers == {name}
    read = resolve(written.tensors, where, metadata=written.header, component=component, family=family)
    assert read.entries.keys() >= {layer}


def test_every_family_and_every_dialect_has_a_name_here() -> None:
    from lycoris.files.dialects import DIALECTS

    assert {row[0] for row in EXPECTED} | {"sd2", "language-model"} >= set(FAMILIES)
    unnamed = {"peft", "onetrainer-diffusers", "onetrainer-kohya", "onetrainer-comfy", "bare"}
    assert {row[4] for row in EXPECTED} | unnamed >= set(DIALECTS)


@pytest.mark.parametrize("adapter", ["default", "my_adapter"])
def test_names_of_adapters_in_names_of_tensors(adapter: str) -> None:
    """What a model in PEFT's hands has in its own state dict, saved by hand."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6))
    lora = {f"0.lora_A.{adapter}.weight": torch.ones(2, 4), f"0.lora_B.{adapter}.weight": torch.ones(6, 2)}
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    loha = {f"1.hada_{name}.{adapter}": torch.ones((6, 2) if name.endswith("a") else (2, 6)) for name in names}
    tensors = {f"base_model.model.{key}": tensor for key, tensor in (lora | loha).items()}
    found = resolve(tensors, model)
    assert "its scale is assumed to be 1" in str(found.report)
    assert not found.report.unused
    assert [entry.algorithm.name for (entry,) in found.entries.values()] == ["lora", "loha"]
    two = tensors | {"base_model.model.0.lora_A.other.weight": torch.zeros(2, 4)}
    with pytest.raises(FileError, match="are the same tensor under two names"):
        resolve(two, model, strict=False)


SPELLED = {
    "kohya": ("lora_unet_double_blocks_0_img_mlp_0", "lora_down.weight", "lora_up.weight", "alpha"),
    "diffusers": ("transformer.transformer_blocks.0.ff.net.0.proj", "lora_A.weight", "lora_B.weight"),
    "musubi-other": ("diffusion_model.double_blocks.0.img_mlp.0", "lora_A.weight", "lora_B.weight"),
    "onetrainer-comfy": ("diffusion_model.double_blocks.0.img_mlp.0", "lora_A.weight", "lora_B.weight", "alpha"),
    "onetrainer-diffusers": ("transformer.transformer_blocks.0.ff.net.0.proj", "lora_A.weight", "lora_B.weight"),
    "ai-toolkit": ("transformer.transformer_blocks.0.ff.net.0.proj", "lora_A.weight", "lora_B.weight"),
    "comfyui": ("diffusion_model.double_blocks.0.img_mlp.0", "lora_down.weight", "lora_up.weight", "alpha"),
}


@pytest.mark.parametrize("dialect", SPELLED)
def test_tensors_and_scale(dialect: str) -> None:
    """Without alpha in the file, its two factors multiply to what they are trained as."""
    from lycoris.models.families import ARCHITECTURES

    where, layer = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-dev"), "transformer_blocks.0.ff.net.0.proj"
    algorithm, geometry = LoRA(rank=4, alpha=1.0), where.layers[layer]
    p = {slot: torch.randn(what.shape, dtype=torch.float64) for slot, what in algorithm.slots(geometry).items()}
    written = compose(Bundle({layer: (Entry(algorithm, geometry, p),)}), dialect, model=where)
    name, down, up, *alpha = SPELLED[dialect]
    assert set(written.tensors) == {f"{name}.{suffix}" for suffix in (down, up, *alpha)}
    product = written.tensors[f"{name}.{up}"] @ written.tensors[f"{name}.{down}"]
    inside = 1.0 if alpha or dialect == "diffusers" else 0.25
    assert torch.allclose(product, p["up"] @ p["down"] * inside, rtol=1e-12)


LENGTHS = [
    ("diffusers", "out", "lora_magnitude_vector", (3072,)),
    ("onetrainer-diffusers", "out", "lora_magnitude_vector", (3072,)),
    ("onetrainer-diffusers", "in", "dora_scale", (1, 12288)),
    ("onetrainer-comfy", "out", "dora_scale", (3072, 1)),
    ("onetrainer-kohya", "in", "dora_scale", (1, 12288)),
    ("comfyui", "out", "dora_scale", (3072, 1)),
    ("kohya", "out", "dora_scale", (3072, 1)),
]


@pytest.mark.parametrize(("dialect", "axis", "name", "shape"), LENGTHS)
def test_lengths_of_dora(dialect: str, axis: Literal["out", "in"], name: str, shape: tuple[int, ...]) -> None:
    from lycoris.models.families import ARCHITECTURES

    where, layer = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-dev"), "transformer_blocks.0.ff.net.2"
    algorithm, geometry = DoRA(inner=LoRA(rank=2), axis=axis), where.layers[layer]
    p = {slot: torch.randn(what.shape) for slot, what in algorithm.slots(geometry).items()}
    written = compose(Bundle({layer: (Entry(algorithm, geometry, p),)}), dialect, model=where)
    ((key, lengths),) = [item for item in written.tensors.items() if item[0].endswith(("_vector", "dora_scale"))]
    assert key.rpartition(".")[2] == name
    assert lengths.shape == shape
    ((entry,),) = resolve(written.tensors, where, metadata=written.header).entries.values()
    assert isinstance(entry.algorithm, DoRA)
    assert entry.algorithm.axis == axis
    assert torch.equal(entry.tensors["magnitude"], p["magnitude"])


def test_a_foreign_reading_of_lokr_is_none_of_musubis() -> None:
    """What musubi's converter leaves alone: alpha stays for everything but LoRA."""
    from lycoris.models.families import ARCHITECTURES

    where, layer = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-dev"), "transformer_blocks.0.ff.net.0.proj"
    algorithm, geometry = LoKr(rank=2, alpha=1.0), where.layers[layer]
    p = {slot: torch.randn(what.shape) for slot, what in algorithm.slots(geometry).items()}
    written = compose(Bundle({layer: (Entry(algorithm, geometry, p),)}), "musubi-other", model=where)
    assert "diffusion_model.double_blocks.0.img_mlp.0.alpha" in written.tensors
