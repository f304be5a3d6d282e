"""The classes of each family are those of its models, and what families refer to exists."""

from __future__ import annotations

import re

import pytest
from test_families import spelt

from lycoris.models import outline
from lycoris.models.families import ARCHITECTURES, FAMILIES
from lycoris.models.families.others import OTHERS


class TestClasses:
    @pytest.mark.sample(16)
    @pytest.mark.parametrize(
        ("name", "model"),
        [
            pytest.param(name, model, marks=() if model == each.outlines[0] else pytest.mark.slow)
            for name, each in ARCHITECTURES.items()
            for model in each.outlines
        ],
    )
    def test_are_those_of_the_outlines(self, name: str, model: str) -> None:
        architecture, known = ARCHITECTURES[name], outline.load_outline(model)
        assert known["class"] in architecture.classes
        found = {type(module).__name__ for module in outline.load_model(model).modules()}
        assert found & set(architecture.blocks)
        for role in (architecture.attention, architecture.feed_forward):
            assert found & {name.partition(".")[0] for name in role}

    def test_exist_in_the_libraries(self) -> None:
        diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
        there = {*dir(diffusers), *dir(transformers)}
        known = (*ARCHITECTURES.values(), *OTHERS)
        assert {each.name for each in known if each.classes and each.classes[0] not in there} == set()

    @pytest.mark.parametrize(
        ("name", "naming", "trained", "left_out"),
        [
            ("wan", "original", "blocks.3.cross_attn.k_img", "head.head"),
            ("wan", "original", "blocks.3.ffn.2", "time_projection.1"),
            ("z-image", "diffusers", "layers.3.attention.to_out.0", "noise_refiner.0.attention.to_q"),
            ("z-image", "diffusers", "layers.3.feed_forward.w1", "layers.3.adaLN_modulation.0"),
            ("flux1", "original", "double_blocks.3.img_attn.qkv", "double_blocks.3.txt_mod.lin"),
            ("flux1", "original", "single_blocks.3.linear1", "single_blocks.3.modulation.lin"),
            ("flux2", "original", "single_blocks.3.linear2", "single_stream_modulation.lin"),
            ("hunyuanvideo", "original", "double_blocks.3.txt_attn_proj", "single_blocks.3.modulation.linear"),
            ("hunyuanvideo-1.5", "original", "double_blocks.3.img_attn_q", "txt_in.input_embedder"),
            ("framepack", "diffusers", "transformer_blocks.3.ff.net.2", "transformer_blocks.3.norm1.linear"),
        ],
    )
    def test_excludes(self, name: str, naming: str, trained: str, left_out: str) -> None:
        architecture = ARCHITECTURES[name]
        assert {trained, left_out} <= {each for model in architecture.outlines for each in spelt(name, naming, model)}
        assert not any(re.match(pattern, trained) for pattern in architecture.musubi_targets.excludes)
        assert any(re.match(pattern, left_out) for pattern in architecture.musubi_targets.excludes)


class TestFamilies:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_refer_to_what_exists(self, name: str) -> None:
        family = FAMILIES[name]
        assert family.name == name
        assert "" in family.components
        assert set(family.components.values()) <= set(ARCHITECTURES)
        assert {*family.kohya.values(), *family.comfyui.values()} <= set(family.components)
        assert all(each == each.lower() for each in family.versions)

    @pytest.mark.parametrize(
        ("version", "family"),
        [
            ("sd_v1", "sd1.5"),
            ("stable-diffusion-v2-768-v/lora", "sd2"),
            ("sdxl_base_v1-0", "sdxl"),
            ("sdxl_1.0", "sdxl"),
            ("stable-diffusion-3-5-large/lora", "sd3"),
            ("flux-1-dev/lora", "flux1"),
            ("flux1", "flux1"),
            ("Flux.1-dev", "flux1"),
            ("Flux.2-klein-4b", "flux2"),
            ("flux_2_dev", "flux2"),
            ("Qwen-Image-Edit-2511", "qwen-image"),
            ("Z-Image", "z-image"),
            ("wan2.1", "wan"),
            ("hunyuan-video", "hunyuanvideo"),
            ("hunyuan_video_1_5", "hunyuanvideo-1.5"),
            ("hunyuan-video-1.5", "hunyuanvideo-1.5"),
            ("framepack", "framepack"),
            ("lumina-2/lora", "lumina2"),
            ("hunyuan-image-2.1", "hunyuanimage"),
            ("chroma/lora", "chroma"),
            ("anima-preview/lora", "cosmos-predict2"),
            ("Kandinsky-5", "kandinsky5"),
            ("Krea-2", "krea2"),
            ("ideogram4", "ideogram4"),
            ("Qwen-Image-2.1", "qwen-image-2.1"),
            ("flux.3", "flux3"),
            ("ltx-2.3", "ltx-2"),
            ("ltxv-13b", "ltx-video"),
            ("hidream_o1_image", None),
            ("stable-cascade", None),
        ],
    )
    def test_the_longest_version_that_fits_tells_the_family(self, version: str, family: str | None) -> None:
        fits = [(len(v), f.name) for f in FAMILIES.values() for v in f.versions if version.lower().startswith(v)]
        assert (max(fits)[1] if fits else None) == family

    def test_t5_of_flux_goes_by_two_prefixes(self) -> None:
        kohya = FAMILIES["flux1"].kohya
        assert [prefix for prefix, of in kohya.items() if of == "text_encoder_2"] == ["lora_te3", "lora_te2"]
