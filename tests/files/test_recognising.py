"""Files of a few layers, that several models have: taken for one of them only where nothing hangs on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lycoris.errors import FileError
from lycoris.files import check, convert, detect, judge, read_header, resolve
from lycoris.files.dialects.base import flatten
from lycoris.files.layout import NamedLayout
from lycoris.files.skeleton import list_namings, load_skeleton, name_layers
from lycoris.models import outline
from lycoris.models.families import ARCHITECTURES

BLOCKS = {f"lora_unet_double_blocks_{at}_img_attn_qkv": (9216, 3072) for at in range(2)}
"""Of Flux.1, of Flux.2, of HunyuanVideo and of FramePack."""


def lora(prefix: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {f"{prefix}.lora_up.weight": torch.randn(rows, 2), f"{prefix}.lora_down.weight": torch.randn(2, columns)}


def written(path: Path, layers: dict[str, tuple[int, int]], told: str | None = None) -> Path:
    tensors = {key: tensor for name, shape in layers.items() for key, tensor in lora(name, *shape).items()}
    save_file(tensors, path, {} if told is None else {"ss_base_model_version": told})
    return path


def test_names_that_hang_on_a_guess_are_refused(tmp_path: Path) -> None:
    source, target = written(tmp_path / "a.safetensors", BLOCKS), tmp_path / "b.safetensors"
    with pytest.raises(FileError, match=r"may be of \S+ or of framepack-i2v, .* Say which it is for: --base \S+ or"):
        convert(source, target, "musubi")
    assert not target.exists()
    assert detect(source).confidence == "unsure"


def test_nothing_hangs_on_it_where_the_names_are_the_same(tmp_path: Path) -> None:
    source, target = written(tmp_path / "a.safetensors", BLOCKS), tmp_path / "b.safetensors"
    done = str(convert(source, target, "comfyui"))
    assert "; unsure\n" in done
    assert "diffusion_model.double_blocks.1.img_attn.qkv.lora_up.weight" in load_file(target)
    assert not {"lycoris_family", "lycoris_base"} & read_header(target).metadata.keys(), "a guess is no fact"


@pytest.mark.parametrize(
    ("told", "outline_", "family", "key"),
    [
        ("flux1", "flux.1-schnell", "flux1", "diffusion_model.double_blocks.0.img_attn.qkv"),
        ("hunyuan-video", "hunyuanvideo", "hunyuanvideo", "diffusion_model.double_blocks.0.img_attn.qkv"),
    ],
)
def test_a_header_or_a_model_decides(told: str, outline_: str, family: str, key: str, tmp_path: Path) -> None:
    told_by_header = written(tmp_path / "a.safetensors", BLOCKS, told)
    silent = written(tmp_path / "b.safetensors", BLOCKS)
    done = convert(told_by_header, tmp_path / "c.safetensors", "comfyui")
    assert f"taken to be for {family}" in str(done)
    given = convert(silent, tmp_path / "d.safetensors", "comfyui", base=outline.load_model(outline_))
    assert "taken to be" not in str(given)
    for path in (tmp_path / "c.safetensors", tmp_path / "d.safetensors"):
        assert read_header(path).metadata["lycoris_family"] == family
        assert any(name.startswith(key) for name in load_file(path)), path


def test_a_model_that_is_given_counts_for_the_header_too(tmp_path: Path) -> None:
    """Not the family that the file says, nor the one that its names suggest."""
    source = written(tmp_path / "a.safetensors", BLOCKS, "flux1")
    convert(source, tmp_path / "b.safetensors", "comfyui", base=outline.load_model("hunyuanvideo"))
    assert read_header(tmp_path / "b.safetensors").metadata["lycoris_family"] == "hunyuanvideo"


def test_a_header_of_another_base_is_not_handed_on(tmp_path: Path) -> None:
    source = written(tmp_path / "a.safetensors", BLOCKS)
    said = {"lycoris_family": "sdxl", "lycoris_base": '{"model": "X", "layers": "0"}', "ss_output_name": "x"}
    save_file(load_file(source), source, said)
    done = convert(source, tmp_path / "b.safetensors", "comfyui", base=outline.load_model("hunyuanvideo"))
    after = read_header(tmp_path / "b.safetensors").metadata
    assert after["lycoris_family"] == "hunyuanvideo"
    assert after["ss_output_name"] == "x"
    assert '"X"' not in after["lycoris_base"]
    assert "made for another base, a X" in str(done)


def test_text_encoders_are_counted_as_the_given_model_s_family_does(tmp_path: Path) -> None:
    layers = {"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)}
    layers |= {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": (4096, 4096)}
    source = written(tmp_path / "a.safetensors", layers)
    convert(source, tmp_path / "b.safetensors", "diffusers", base=outline.load_model("flux.1-dev"), allow_growth=True)
    assert any(key.startswith("text_encoder_2.encoder.") for key in load_file(tmp_path / "b.safetensors"))
    assert check(source, "comfyui", base=outline.load_model("flux.1-dev")).as_trained


def test_one_layer_of_a_unet_is_of_the_model_that_the_header_names(tmp_path: Path) -> None:
    layer = "lora_unet_time_embedding_linear_1"
    shapes = {name: tuple(t.shape) for name, t in lora(layer, 1280, 320).items()}
    assert len({each.architecture.name for each in judge(shapes, {}).fits[""]}) > 1
    found = judge(shapes, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert found.family == "sdxl"
    assert {each.architecture.name for each in found.fits[""]} == {"sdxl-unet"}


def test_a_header_of_another_family_is_remarked() -> None:
    layers = {name: tuple(t.shape) for name, t in lora("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072).items()}
    found = judge(layers, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert found.family != "sdxl"
    assert "its header says sdxl, which has no such layers" in str(found)


def test_a_header_that_contradicts_the_model_is_remarked() -> None:
    sd3 = NamedLayout.from_model(outline.load_model("sd3-medium"))
    tensors = lora("lora_unet_joint_blocks_3_x_block_attn_proj", 1536, 1536)
    report = resolve(tensors, sd3, metadata={"ss_base_model_version": "sdxl_base_v1-0"}).report
    assert "its header says sdxl, and the model is a sd3" in str(report)
    assert "header says" not in str(resolve(tensors, sd3, metadata={"ss_base_model_version": "sd3m"}).report)
    with pytest.raises(FileError, match="unknown family 'sd-3'"):
        resolve(tensors, sd3, family="sd-3")


def test_text_encoders_are_those_of_the_family(tmp_path: Path) -> None:
    """CLIP-L has a projection in SD3 and none in SDXL, and other names in diffusers."""
    encoder = "text_model_encoder_layers_0_self_attn_q_proj"
    for told, kind in (("sd3m", "clip-with-projection"), ("sdxl_base_v1-0", "clip")):
        layers = {f"lora_te1_{encoder}": (768, 768)}
        found = detect(written(tmp_path / "a.safetensors", layers, told))
        assert found.fits["text_encoder"][0].architecture.name == kind
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", overwrite=True)
        names = {name.partition(".lora_")[0] for name in load_file(tmp_path / "b.safetensors")}
        assert names == {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj"}
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", overwrite=True)
        assert {name.partition(".")[0] for name in load_file(tmp_path / "c.safetensors")} == {f"lora_te1_{encoder}"}


def flux_like(model: str, naming: str, flat: bool, modulations: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a LoRA on all linear layers in the blocks of a model."""
    architecture = next(each for each in ARCHITECTURES.values() if model in each.outlines)
    layers, shapes = load_skeleton(model), {}
    for name, span in name_layers(layers, list_namings(architecture)[naming]).items():
        own = [layers[part] for part in span.parts]
        if own[0].kind != "linear" or "blocks" not in name or ("mod" in name and not modulations):
            continue
        key = f"lora_unet_{flatten(name)}" if flat else f"diffusion_model.{name}"
        shapes[f"{key}.lora_down.weight"] = (4, own[0].fan_in)
        shapes[f"{key}.lora_up.weight"] = (sum(each.out_features for each in own), 4)
    return shapes


@pytest.mark.parametrize("flat", [False, True])
def test_blocks_that_two_families_have_are_for_neither_until_a_header_says(flat: bool) -> None:
    """Chroma's are Flux.1's without the modulations."""
    chroma = flux_like("chroma1-hd", "original", flat, modulations=False)
    assert chroma == flux_like("flux.1-dev", "original", flat, modulations=False)
    found = judge(chroma, {})
    assert (found.family, found.confidence) == (None, "unsure")
    assert {"chroma1-hd", "flux.1-dev", "flux.1-schnell"} <= set(found.candidates)
    for said, family in (("chroma/lora", "chroma"), ("flux-1-dev/lora", "flux1")):
        found = judge(chroma, {"modelspec.architecture": said})
        assert found.family == family
        assert not {"chroma1-hd", "flux.1-dev"} <= set(found.candidates)
    assert judge(flux_like("flux.1-dev", "original", flat, modulations=True), {}).family == "flux1"


def test_sizes_decide_between_models_of_the_same_names() -> None:
    """HunyuanImage has the names of HunyuanVideo, and is wider."""
    for model, family in (("hunyuanimage-2.1", "hunyuanimage"), ("chroma1-hd", None)):
        found = judge(flux_like(model, "comfyui" if "hunyuan" in model else "original", False, modulations=False), {})
        assert found.family == family
