"""What is said of each family holds together: names, rows, classes, prefixes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from lycoris.files.skeleton import Skeleton, list_namings, load_skeleton, name_layers, translate_layers
from lycoris.models import outline
from lycoris.models.families import ARCHITECTURES
from lycoris.models.families.naming import Naming

KNOWN = [
    (architecture.name, naming, model)
    for architecture in ARCHITECTURES.values()
    for naming in list_namings(architecture)
    for model in architecture.outlines
]
COUNTS = {
    "sd-1.5": (859_520_964, 184, 98),
    "sd-2.1": (865_910_724, 216, 66),
    "sdxl": (2_567_463_684, 743, 51),
    "sd3-medium": (2_028_328_000, 340, 1),
    "sd3.5-medium": (2_243_171_520, 392, 1),
    "sd3.5-large": (8_056_627_520, 536, 1),
    "flux.1-dev": (11_901_408_320, 504, 0),
    "flux.1-schnell": (11_891_178_560, 502, 0),
    "flux.2-dev": (32_223_281_152, 203, 0),
    "flux.2-klein-4b": (3_875_544_576, 109, 0),
    "flux.2-klein-9b": (9_078_581_248, 153, 0),
    "qwen-image": (20_430_401_088, 846, 0),
    "z-image": (6_154_908_736, 276, 0),
    "wan2.1-t2v-1.3b": (1_418_996_800, 306, 1),
    "wan2.1-t2v-14b": (14_288_491_584, 406, 1),
    "wan2.1-i2v-14b": (16_394_878_784, 488, 1),
    "wan2.2-i2v-a14b": (14_288_901_184, 406, 1),
    "wan2.2-ti2v-5b": (4_999_787_712, 306, 1),
    "hunyuanvideo": (12_821_012_544, 547, 1),
    "hunyuanvideo-1.5": (8_326_608_160, 784, 1),
    "framepack-i2v": (12_874_314_816, 549, 4),
    "lumina2": (2_609_769_152, 244, 0),
    "llama-3.1-8b": (8_030_261_248, 225, 0),
    "llama-3.2-1b": (1_235_814_400, 113, 0),
    "qwen2.5-7b": (7_615_616_512, 197, 0),
    "qwen3-8b": (8_190_735_360, 253, 0),
    "mistral-7b-v0.3": (7_248_023_552, 225, 0),
    "gemma2-2b": (2_614_341_888, 183, 0),
    "clip-l": (123_060_480, 72, 0),
    "clip-l-projection": (123_650_304, 73, 0),
    "openclip-h": (340_387_840, 138, 0),
    "clip-bigg": (694_659_840, 193, 0),
    "t5-xxl": (4_762_310_656, 168, 0),
    "auraflow": (6_833_439_744, 326, 0),
    "chroma1-hd": (8_899_983_424, 433, 0),
    "cosmos-predict2-14b": (14_265_265_152, 582, 0),
    "cosmos-predict2-14b-video": (14_265_285_632, 582, 0),
    "cosmos-predict2-2b": (1_956_405_248, 454, 0),
    "cosmos-predict2-2b-video": (1_956_413_440, 454, 0),
    "ernie-image": (8_033_490_048, 258, 1),
    "flux.3": (5_538_458_368, 271, 0),
    "hidream-i1": (17_105_733_184, 1128, 0),
    "hunyuanimage-2.1": (17_425_795_520, 546, 1),
    "hunyuanimage-2.1-distilled": (17_453_334_976, 550, 1),
    "ideogram-4": (9_279_288_448, 279, 0),
    "kandinsky5-lite-image": (6_022_080_576, 571, 0),
    "kandinsky5-lite-video": (2_007_702_848, 373, 0),
    "kandinsky5-pro-video": (19_311_325_248, 695, 0),
    "krea-2": (12_820_073_036, 264, 0),
    "ltx-2": (18_876_174_592, 1370, 0),
    "ltx-2.3": (18_988_838_144, 1660, 0),
    "ltx-video-13b": (13_042_569_344, 487, 0),
    "ltx-video-2b": (1_923_385_472, 287, 0),
    "minimax-h3": (33_122_992_896, 370, 0),
    "mochi-1": (10_027_677_744, 677, 1),
    "pixart-alpha": (611_349_152, 290, 1),
    "pixart-sigma": (610_856_096, 286, 1),
    "qwen-image-2.1": (7_115_124_736, 232, 0),
    "sana-1600m": (1_604_462_752, 166, 61),
    "sana-600m": (591_747_872, 230, 85),
}
"""Parameters, linear layers and convolutions of the published models."""


def fused(layers: Skeleton, naming: Naming) -> dict:
    """The same layers as a model in that naming has them."""
    found = {}
    for name, span in name_layers(layers, naming).items():
        parts = [layers[part] for part in span.parts]
        rows = sum(part.out_features for part in parts)
        found[name] = replace(parts[0], shape=(rows, *parts[0].shape[1:]))
    return found


def spelt(architecture: str, naming: str, model: str) -> dict:
    return fused(load_skeleton(model), list_namings(ARCHITECTURES[architecture])[naming])


class TestNamings:
    @pytest.mark.parametrize(("architecture", "naming", "model"), KNOWN)
    def test_every_layer_has_one_name_and_every_name_its_layers(self, architecture, naming, model) -> None:
        layers, names = load_skeleton(model), list_namings(ARCHITECTURES[architecture])[naming]
        held = name_layers(layers, names)
        assert Counter(part for span in held.values() for part in span.parts) == Counter(list(layers))
        for path in layers:
            name = names.find_module(path) or path
            assert path in (names.find_span(name).parts if names.find_span(name) else (name,))
        flat = [name.replace(".", "_") for name in held]
        assert len(set(flat)) == len(flat)

    @pytest.mark.parametrize(("architecture", "naming", "model"), KNOWN)
    def test_there_and_back(self, architecture, naming, model) -> None:
        names = list_namings(ARCHITECTURES[architecture])[naming]
        assert translate_layers(spelt(architecture, naming, model), names) == dict(load_skeleton(model))

    @pytest.mark.parametrize(("architecture", "naming", "model"), KNOWN)
    def test_the_rows_of_a_module_are_those_of_its_parts(self, architecture, naming, model) -> None:
        names = list_namings(ARCHITECTURES[architecture])[naming]
        for name, geometry in spelt(architecture, naming, model).items():
            rows = geometry.out_features
            assert sum(names.split_rows(name, rows, geometry.fan_in)) == rows

    @pytest.mark.parametrize(
        ("architecture", "naming", "model", "inside", "count"),
        [
            ("flux1", "original", "flux.1-dev", r"(double|single)_blocks\.", 304),
            ("sd3", "original", "sd3.5-medium", r"joint_blocks\.", 263),
            ("lumina2", "original", "lumina2", r"(layers|\w+_refiner|final_layer)\.", 180),
            ("sdxl-unet", "sgm", "sdxl", "", 794),
            ("sd1.5-unet", "sgm", "sd-1.5", "", 282),
        ],
    )
    def test_trainers_find_that_many_layers_in_the_original(self, architecture, naming, model, inside, count) -> None:
        names = spelt(architecture, naming, model).items()
        assert sum(bool(re.match(inside, n)) and g.kind in ("linear", "conv") for n, g in names) == count

    @pytest.mark.parametrize(
        ("model", "naming", "swapped"),
        [
            ("sd3-medium", "original", {"joint_blocks.23.context_block.adaLN_modulation.1"}),
            ("sd3.5-large", "original", {"joint_blocks.37.context_block.adaLN_modulation.1"}),
            ("flux.1-dev", "original", set()),
            ("flux.2-klein-4b", "original", set()),
            ("hunyuanvideo", "original", set()),
            ("hunyuanvideo", "comfyui", set()),
            ("hunyuanvideo-1.5", "original", set()),
            ("hunyuanvideo-1.5", "comfyui", set()),
            ("framepack-i2v", "comfyui", set()),
            ("hunyuanimage-2.1", "original", set()),
            ("hunyuanimage-2.1", "comfyui", set()),
        ],
    )
    def test_final_modulations_are_exchanged(self, model, naming, swapped) -> None:
        architecture = next(each for each in ARCHITECTURES.values() if model in each.outlines)
        layers = load_skeleton(model)
        held = name_layers(layers, architecture.namings[naming])
        found = {name for name, span in held.items() if span.swaps_halves(layers[span.parts[0]])}
        assert found == swapped | {"final_layer.adaLN_modulation.1"}

    @pytest.mark.parametrize("model", ["lumina2", "qwen-image", "z-image", "wan2.1-i2v-14b", "sdxl"])
    def test_others_are_not(self, model) -> None:
        architecture = next(each for each in ARCHITECTURES.values() if model in each.outlines)
        for naming in list_namings(architecture).values():
            assert not any(span.swapped for span in name_layers(load_skeleton(model), naming).values())


UNCHANGED = {
    ("sd3", "original"): {"context_embedder"},
    ("wan", "original"): {"patch_embedding"},
    ("lumina2", "original"): {"x_embedder", "*.*.ffn_norm1", "*.*.ffn_norm2"},
    ("z-image", "comfyui"): {
        "*.*.adaLN_modulation.0",
        "*.*.attention_norm1",
        "*.*.attention_norm2",
        "*.*.feed_forward.w1",
        "*.*.feed_forward.w2",
        "*.*.feed_forward.w3",
        "*.*.ffn_norm1",
        "*.*.ffn_norm2",
        "cap_embedder.0",
        "cap_embedder.1",
        "cap_pad_token",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "x_pad_token",
    },
    ("framepack", "comfyui"): {
        "clean_x_embedder.proj",
        "clean_x_embedder.proj_2x",
        "clean_x_embedder.proj_4x",
        "image_projection.up",
        "image_projection.down",
    },
    ("language-model", "headless"): {"lm_head"},
    ("chroma", "original"): {
        "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.out_proj",
        "distilled_guidance_layer.norms.*",
    },
    ("auraflow", "original"): {"register_tokens"},
    ("mochi", "original"): {"pos_frequencies"},
    ("minimax-h3", "original"): {"token_refiner.final_norm"},
    ("clip-with-projection", "openclip"): {"text_projection"},
}
"""Names that are the same in both; stars for a stack and a number. Namings that are not here change every name."""
MOSTLY_THE_SAME = ("ltx-video", "ltx-2", "ideogram4", "qwen-image-2.1")
"""Held to diffusers' own conversion in the next file."""


@pytest.mark.parametrize(
    "architecture", [name for name, each in ARCHITECTURES.items() if each.namings and name not in MOSTLY_THE_SAME]
)
def test_all_other_names_change(architecture: str) -> None:
    # XLabs' processors are of attention alone.
    complete = {naming: names for naming, names in ARCHITECTURES[architecture].namings.items() if naming != "xlabs"}
    for naming, names in complete.items():
        for model in ARCHITECTURES[architecture].outlines:
            layers = load_skeleton(model)
            same = {name for name, span in name_layers(layers, names).items() if name in span.parts}
            same = {re.sub(r"^(layers|\w+_refiner)\.\d+\.", "*.*.", name) for name in same}
            same = {re.sub(r"(distilled_guidance_layer\.norms)\.\d+", r"\1.*", name) for name in same}
            assert same == UNCHANGED.get((architecture, naming), set())


@pytest.mark.parametrize("architecture", ["hunyuanvideo", "hunyuanvideo-1.5", "hunyuanimage"])
def test_comfyui_writes_hunyuan_video_like_flux(architecture: str) -> None:
    namings_of = ARCHITECTURES[architecture].namings
    layers = load_skeleton(ARCHITECTURES[architecture].outlines[0])
    found = set()
    for name in name_layers(layers, namings_of["original"]):
        comfyui = re.sub(r"attn_[qkv]$", "attn_qkv", name)
        comfyui = re.sub(r"attn_(qkv|proj)$", r"attn.\1", comfyui)
        comfyui = re.sub(r"mlp\.fc([12])$", lambda fc: f"mlp.{2 * int(fc[1]) - 2}", comfyui)
        comfyui = re.sub(r"[_.]([qk])_norm$", r".norm.\1_norm", comfyui)
        comfyui = comfyui.replace("norm.q_norm", "norm.query_norm").replace("norm.k_norm", "norm.key_norm")
        comfyui = re.sub(r"(_mod|modulation)\.linear$", r"\1.lin", comfyui)
        comfyui = re.sub(r"(_in|t_embedder)\.mlp\.0$", r"\1.in_layer", comfyui)
        comfyui = re.sub(r"(_in|t_embedder)\.mlp\.2$", r"\1.out_layer", comfyui)
        comfyui = comfyui.replace("c_embedder.linear_1", "c_embedder.in_layer")
        comfyui = comfyui.replace("c_embedder.linear_2", "c_embedder.out_layer")
        found.add(comfyui)
        if comfyui == name:
            assert namings_of["comfyui"].find_span(name) == namings_of["original"].find_span(name)
    assert found == set(name_layers(layers, namings_of["comfyui"]))


SPELLINGS = [
    ("hunyuanvideo", "comfyui", "double_blocks.3.img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("hunyuanvideo", "comfyui", "double_blocks.3.txt_mlp.2", ["ff_context.net.2"]),
    ("hunyuanvideo", "comfyui", "double_blocks.3.img_mod.lin", ["norm1.linear"]),
    ("hunyuanvideo", "comfyui", "single_blocks.3.modulation.lin", ["norm.linear"]),
    ("hunyuanvideo", "comfyui", "single_blocks.3.norm.key_norm", ["attn.norm_k"]),
    ("hunyuanvideo", "comfyui", "single_blocks.3.linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    ("hunyuanvideo", "comfyui", "time_in.out_layer", ["time_text_embed.timestep_embedder.linear_2"]),
    (
        "hunyuanvideo",
        "comfyui",
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv",
        ["attn.to_q", "attn.to_k", "attn.to_v"],
    ),
    (
        "hunyuanvideo",
        "comfyui",
        "txt_in.c_embedder.in_layer",
        ["context_embedder.time_text_embed.text_embedder.linear_1"],
    ),
    ("framepack", "comfyui", "double_blocks.3.img_attn.proj", ["attn.to_out.0"]),
    ("hunyuanvideo-1.5", "original", "double_blocks.53.img_attn_k", ["attn.to_k"]),
    ("hunyuanvideo-1.5", "original", "double_blocks.53.txt_attn_v", ["attn.add_v_proj"]),
    ("hunyuanvideo-1.5", "original", "double_blocks.53.img_attn_q_norm", ["attn.norm_q"]),
    ("hunyuanvideo-1.5", "original", "byt5_in.fc3", ["context_embedder_2.linear_3"]),
    ("hunyuanvideo-1.5", "original", "vision_in.proj.3", ["image_embedder.linear_2"]),
    ("hunyuanvideo-1.5", "original", "time_in.mlp.2", ["time_embed.timestep_embedder.linear_2"]),
    ("hunyuanvideo-1.5", "original", "time_r_in.mlp.0", ["time_embed.timestep_embedder_r.linear_1"]),
    (
        "hunyuanvideo-1.5",
        "comfyui",
        "double_blocks.0.txt_attn.qkv",
        ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    ),
    ("hunyuanvideo-1.5", "comfyui", "vision_in.proj.1", ["image_embedder.linear_1"]),
    ("hunyuanvideo-1.5", "comfyui", "time_in.in_layer", ["time_embed.timestep_embedder.linear_1"]),
    ("clip", "text_model", "text_model.encoder.layers.7.mlp.fc1", ["encoder.layers.7.mlp.fc1"]),
    ("language-model", "headless", "layers.7.mlp.up_proj", ["model.layers.7.mlp.up_proj"]),
    ("sd1.5-unet", "sgm", "output_blocks.2.1.conv", ["up_blocks.0.upsamplers.0.conv"]),
    ("sd1.5-unet", "sgm", "output_blocks.5.2.conv", ["up_blocks.1.upsamplers.0.conv"]),
    ("sdxl-unet", "sgm", "output_blocks.2.2.conv", ["up_blocks.0.upsamplers.0.conv"]),
    ("sdxl-unet", "sgm", "input_blocks.6.0.op", ["down_blocks.1.downsamplers.0.conv"]),
    ("sdxl-unet", "sgm", "middle_block.2.out_layers.3", ["mid_block.resnets.1.conv2"]),
]


@pytest.mark.parametrize(("architecture", "naming", "name", "parts"), SPELLINGS)
def test_spellings(architecture: str, naming: str, name: str, parts: list[str]) -> None:
    names = ARCHITECTURES[architecture].namings[naming]
    found = names.find_span(name).parts
    assert [path.endswith(part) for path, part in zip(found, parts, strict=True)] == [True] * len(parts)
    assert {names.find_module(path) for path in found} == {name}


def test_a_name_of_no_model_has_no_place_in_the_unet() -> None:
    unet = ARCHITECTURES["sdxl-unet"].namings["sgm"]
    for name in ("input_blocks.3.1.proj_in", "input_blocks.4.0.conv", "middle_block.3.norm", "down_blocks.0", ""):
        assert unet.find_span(name) is None
    for path in ("down_blocks.0.downsamplers.0.op", "mid_block.resnets.2.conv1", "input_blocks.0.0", ""):
        assert unet.find_module(path) is None


class TestOutlines:
    @pytest.mark.sample(12)
    @pytest.mark.parametrize("model", COUNTS)
    def test_counts_are_the_published_ones(self, model: str) -> None:
        kinds = Counter(geometry.kind for geometry in load_skeleton(model).values())
        parameters = sum(each.numel() for each in outline.load_model(model).parameters())
        assert (parameters, kinds["linear"], kinds["conv"]) == COUNTS[model]

    def test_every_one_is_of_one_architecture(self) -> None:
        assert Counter(model for each in ARCHITECTURES.values() for model in each.outlines) == Counter(
            outline.list_models()
        )
        assert set(COUNTS) == set(outline.list_models())
