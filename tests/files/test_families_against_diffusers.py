"""The namings against diffusers' own conversion of published checkpoints, tensor for tensor and at full length.

Tensors have the rows of the published model but a single column, so that whole checkpoints fit in a few megabytes.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import single_file_utils as single_file
from torch import Tensor

from lycoris.files.skeleton import list_namings, load_skeleton, name_layers
from lycoris.models.families import ARCHITECTURES

SCALES = ("query_norm", "key_norm", ".qnorm", ".knorm", ".prenorm", ".postnorm", "txtmlp.0", "last.norm")
"""Norms whose weight is called scale."""
BARE = ("positional_embedding",)
"""Parameters there that are the weight of a module here."""
UNCHECKED = ("text_projection",)
"""Stored transposed."""
BESIDE = {
    **{model: {"pos_embed": torch.zeros(1)} for model in ("sd3-medium", "sd3.5-medium", "sd3.5-large")},
    **{m: {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)} for m in ("sana-1600m", "sana-600m")},
}
"""Buffers of a checkpoint, which are no place for adapters."""
OPTIONS = {"minimax-h3": {"config": {}}}
"""What a conversion wants to know besides."""


def checkpoints(model: str, naming: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint of distinct numbers under the names of a naming, and the same under those of diffusers."""
    architecture = next(each for each in ARCHITECTURES.values() if model in each.outlines)
    layers = load_skeleton(model)
    original, expected, start = {}, {}, 0
    for name, span in name_layers(layers, list_namings(architecture)[naming]).items():
        if name in UNCHECKED:
            continue
        for kind in ("weight", "bias"):
            found = []
            for part in span.parts:
                geometry = layers[part]
                if kind == "bias" and not geometry.has_bias:
                    continue
                rows = geometry.out_features
                value = torch.arange(start, start + rows, dtype=torch.int32)
                start += rows
                if kind == "weight" and geometry.kind != "norm":
                    value = value[:, None]
                expected[part if geometry.kind == "parameter" else f"{part}.{kind}"] = value
                found.append(torch.cat(value.chunk(2)[::-1]) if span.swaps_halves(geometry) else value)
            if found:
                original[key(name, kind, layers[span.parts[0]].kind)] = torch.cat(found)
    return original, expected


def key(name: str, tensor: str, kind: str) -> str:
    if name.endswith("in_proj_weight"):
        return name.removesuffix("weight") + tensor
    if kind == "parameter" or name in BARE:
        return name
    scaled = name.endswith(SCALES) or name.startswith("distilled_guidance_layer.norms.")
    return f"{name}.{'scale' if scaled and tensor == 'weight' else tensor}"


def assert_same(converted: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(converted) == set(expected)
    assert [name for name in expected if not torch.equal(converted[name], expected[name])] == []


@pytest.mark.parametrize("model", ["sd-1.5", "sd-2.1", "sdxl"])
def test_unets(model: str) -> None:
    original, expected = checkpoints(model, "sgm")
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if model == "sdxl" else None}
    stored = {f"model.diffusion_model.{name}": value for name, value in original.items()}
    assert_same(single_file.convert_ldm_unet_checkpoint(stored, config), expected)


@pytest.mark.parametrize(
    ("model", "naming", "convert"),
    [
        ("sd3-medium", "original", "convert_sd3_transformer_checkpoint_to_diffusers"),
        ("sd3.5-medium", "original", "convert_sd3_transformer_checkpoint_to_diffusers"),
        ("sd3.5-large", "original", "convert_sd3_transformer_checkpoint_to_diffusers"),
        ("flux.1-dev", "original", "convert_flux_transformer_checkpoint_to_diffusers"),
        ("flux.1-schnell", "original", "convert_flux_transformer_checkpoint_to_diffusers"),
        ("flux.2-dev", "original", "convert_flux2_transformer_checkpoint_to_diffusers"),
        ("flux.2-klein-4b", "original", "convert_flux2_transformer_checkpoint_to_diffusers"),
        ("flux.2-klein-9b", "original", "convert_flux2_transformer_checkpoint_to_diffusers"),
        ("z-image", "comfyui", "convert_z_image_transformer_checkpoint_to_diffusers"),
        ("wan2.1-t2v-1.3b", "original", "convert_wan_transformer_to_diffusers"),
        ("wan2.1-t2v-14b", "original", "convert_wan_transformer_to_diffusers"),
        ("wan2.1-i2v-14b", "original", "convert_wan_transformer_to_diffusers"),
        ("wan2.2-i2v-a14b", "original", "convert_wan_transformer_to_diffusers"),
        ("wan2.2-ti2v-5b", "original", "convert_wan_transformer_to_diffusers"),
        ("hunyuanvideo", "original", "convert_hunyuan_video_transformer_to_diffusers"),
        ("lumina2", "original", "convert_lumina2_to_diffusers"),
        ("chroma1-hd", "original", "convert_chroma_transformer_checkpoint_to_diffusers"),
        ("flux.3", "original", "convert_flux3_transformer_checkpoint_to_diffusers"),
        ("qwen-image-2.1", "comfyui", "convert_qwen_image21_transformer_checkpoint_to_diffusers"),
        ("auraflow", "original", "convert_auraflow_transformer_checkpoint_to_diffusers"),
        ("sana-1600m", "original", "convert_sana_transformer_to_diffusers"),
        ("sana-600m", "original", "convert_sana_transformer_to_diffusers"),
        ("hidream-i1", "diffusers", "convert_hidream_transformer_to_diffusers"),
        ("krea-2", "original", "convert_krea2_transformer_checkpoint_to_diffusers"),
        ("ernie-image", "diffusers", "convert_ernie_image_transformer_checkpoint_to_diffusers"),
        ("cosmos-predict2-2b", "original", "convert_cosmos_transformer_checkpoint_to_diffusers"),
        ("cosmos-predict2-14b-video", "original", "convert_cosmos_transformer_checkpoint_to_diffusers"),
        ("ltx-video-2b", "original", "convert_ltx_transformer_checkpoint_to_diffusers"),
        ("ltx-video-13b", "original", "convert_ltx_transformer_checkpoint_to_diffusers"),
        ("ltx-2", "original", "convert_ltx2_transformer_to_diffusers"),
        ("mochi-1", "original", "convert_mochi_transformer_checkpoint_to_diffusers"),
        ("minimax-h3", "original", "convert_minimax_h3_transformer_checkpoint_to_diffusers"),
    ],
)
def test_transformers(model: str, naming: str, convert: str) -> None:
    original, expected = checkpoints(model, naming)
    converted = getattr(single_file, convert)({**original, **BESIDE.get(model, {})}, **OPTIONS.get(model, {}))
    if model.startswith("sd3"):
        del converted["pos_embed.pos_embed"]
    assert_same(flat(converted), flat(expected))


def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Krea 2's published code has the six vectors of a block as one."""
    return {name: value.flatten() if name.endswith("scale_shift_table") else value for name, value in tensors.items()}


@pytest.mark.parametrize(("model", "width", "root"), [("openclip-h", 1024, "text_model."), ("clip-bigg", 1280, "")])
def test_openclip(model: str, width: int, root: str) -> None:
    original, expected = checkpoints(model, "openclip")
    encoder = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    stored = {f"model.{name}": value for name, value in original.items()}
    converted = single_file.convert_open_clip_checkpoint(encoder, stored, prefix="model.")
    assert_same(converted, {f"{root}{name}": value for name, value in expected.items()})
