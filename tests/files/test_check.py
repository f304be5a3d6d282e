"""`check` on whole files: whose keys a program knows, component by component, and what becomes of each layer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lycoris import OFT, DoRA, Full, LoHa, LoKr, LoRA, TLoRA, write
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.conversion import adapt_affine
from lycoris.files import check
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import NamedLayout
from lycoris.files.programs import PROGRAMS
from lycoris.files.programs.check import ProgramCheck
from lycoris.files.programs.keys import ANY_ARCHITECTURE
from lycoris.files.programs.peft import explain_folder_conflict
from lycoris.files.writing import compose
from lycoris.layers.geometry import Affine, describe
from lycoris.models.families import ARCHITECTURES, FAMILIES

FIRST = r".*\b(blocks|layers|block|transformer_blocks)\.0\..*(attn|attention|SelfAttention).*"
BLOCK = r"transformer_blocks\.0\..*"
"""More of one, by which models with the same attention are told apart."""


def layout_of(architecture: str, outline: str | None = None) -> NamedLayout:
    return NamedLayout.from_outline(ARCHITECTURES[architecture], outline or ARCHITECTURES[architecture].outlines[0])


def bundle_of(layout: NamedLayout, algorithms: tuple[Algorithm, ...] = (LoRA(rank=1),), layers: str = FIRST) -> Bundle:
    torch.manual_seed(0)
    entries = {}
    for name, g in layout.layers.items():
        if re.fullmatch(layers, name) and g.kind == "linear":
            entries[name] = tuple(
                Entry(a, g, {slot: torch.randn(s.shape) for slot, s in a.slots(g).items()}) for a in algorithms
            )
    return Bundle(entries)


def checked(
    folder: Path,
    program: str,
    dialect: str,
    architecture: str,
    algorithms: tuple[Algorithm, ...] = (LoRA(rank=1),),
    layers: str = FIRST,
) -> ProgramCheck:
    layout = layout_of(architecture)
    path = folder / "a.safetensors"
    family = next(name for name, each in FAMILIES.items() if each.components[""] == architecture)
    write(bundle_of(layout, algorithms, layers), path, dialect, model=layout, family=family)
    return check(path, program)


def test_every_key_that_is_told_is_of_something() -> None:
    models = {model for each in ARCHITECTURES.values() for model in each.models}
    encoders = {f"{family.name}/{each}" for family in FAMILIES.values() for each in family.components.values()}
    for consumer in PROGRAMS.values():
        for dialect, known in consumer.keys.items():
            assert dialect in DIALECTS
            assert known.keys() - {ANY_ARCHITECTURE} <= ARCHITECTURES.keys() | models | encoders
            patterns = [pattern for each in known.values() for pattern in each if isinstance(pattern, str)]
            assert all(map(re.compile, patterns))


KNOWN = [
    ("comfyui", "ai-toolkit", "wan", False),
    ("comfyui", "kohya", "wan", True),
    ("comfyui", "kohya", "flux1", True),
    ("comfyui", "comfyui", "hunyuanvideo", True),
    ("comfyui", "musubi-other", "hunyuanvideo", True),
    ("comfyui", "lycoris", "lumina2", False),
    ("comfyui", "onetrainer-legacy", "flux1", True),
    ("comfyui", "bare", "qwen-image", True),
    ("comfyui", "bare", "flux1", False),
    ("comfyui", "peft", "sd3", True),
    ("comfyui", "peft", "flux1", False),
    ("comfyui", "comfyui", None, False),
    ("forge", "kohya", "flux1", True),
    ("forge", "kohya", "wan", False),
    ("forge", "kohya", "qwen-image", False),
    ("forge", "comfyui", "flux2", False),
    ("webui", "kohya", "flux1", False),
    ("webui", "kohya", "sd3", True),
    ("webui", "diffusers", "sd3", True),
    ("webui", "lycoris", "sd3", False),
    ("forge", "kohya", "chroma", True),
    ("forge", "lycoris", "chroma", False),
    ("webui", "kohya", "sdxl-unet", True),
    ("webui", "kohya", "clip", True),
    ("webui", "kohya", "t5", False),
    ("invokeai", "kohya", "flux1", True),
    ("invokeai", "comfyui", "flux1", False),
    ("invokeai", "kohya", "sd3", False),
    ("musubi", "musubi", "wan", True),
    ("musubi", "kohya", "sdxl-unet", False),
    ("musubi", "musubi", "lumina2", False),
    ("diffusers", "diffusers", "hunyuanvideo-1.5", False),
    ("peft", "peft", None, True),
    ("simpletuner", "lycoris", None, True),
    ("simpletuner", "kohya", "flux1", False),
]


@pytest.mark.parametrize(("program", "dialect", "architecture", "known"), KNOWN)
def test_whose_keys_a_program_knows(program: str, dialect: str, architecture: str | None, known: bool) -> None:
    assert (PROGRAMS[program].find_keys(dialect, architecture) is not None) == known


@pytest.mark.parametrize(
    ("program", "dialect", "architecture", "reads"),
    [
        ("comfyui", "kohya", "flux1", True),
        ("comfyui", "musubi", "framepack", False),
        ("comfyui", "kohya", "z-image", False),
        ("comfyui", "musubi", "hunyuanvideo-1.5", False),
        ("comfyui", "musubi", "hunyuanvideo", True),
        ("comfyui", "diffusers", "sdxl-unet", False),
        ("invokeai", "kohya", "flux1", True),
        ("webui", "kohya", "sd1.5-unet", True),
        ("diffusers", "kohya", "flux1", True),
        ("diffusers", "comfyui", "flux2", False),
    ],
)
def test_lora(program: str, dialect: str, architecture: str, reads: bool, tmp_path: Path) -> None:
    assert checked(tmp_path, program, dialect, architecture).as_trained == reads


def test_names_that_a_program_happens_to_have_too(tmp_path: Path) -> None:
    """Without their dots the attention of HunyuanVideo has the names that ComfyUI gives it, and the rest has not."""
    found = checked(tmp_path, "comfyui", "musubi", "hunyuanvideo", layers=r"transformer_blocks\.0\.(attn|ff|norm1).*")
    lost = {layer for layer, each in found.layers.items() if each.reads == "not at all"}
    assert {layer for layer in found.layers if "attn" in layer} == found.layers.keys() - lost
    assert lost >= {"double_blocks.0.img_mlp.fc1", "double_blocks.0.img_mod.linear"}
    assert found.keys == ""


def test_names_of_layers_count_whatever_the_file_is_like(tmp_path: Path) -> None:
    """ai-toolkit's files of Wan have diffusers' names behind one prefix, and the original ones behind the other."""
    layout = layout_of("wan")
    tensors = compose(bundle_of(layout), "onetrainer-comfy", model=layout).tensors
    plain = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    save_file(plain, tmp_path / "a.safetensors", metadata={"software": "{}"})
    found = check(tmp_path / "a.safetensors", "comfyui")
    assert found.detection.dialect == "ai-toolkit"
    assert found.as_trained
    write(bundle_of(layout), tmp_path / "b.safetensors", "ai-toolkit", model=layout)
    assert "ComfyUI does not know keys of the format" in check(tmp_path / "b.safetensors", "comfyui").keys


def test_layers_that_have_no_place(tmp_path: Path) -> None:
    layers = r"(single_)?transformer_blocks\.0\.attn.*|norm_out\.linear"
    found = checked(tmp_path, "diffusers", "kohya", "flux1", layers=layers)
    lost = {layer for layer, verdict in found.layers.items() if verdict.reads == "not at all"}
    assert (found.keys, lost) == ("", {"final_layer.adaLN_modulation.1"})
    found = checked(tmp_path, "invokeai", "kohya", "flux1", layers=layers)
    assert "InvokeAI rejects the file for lora_unet_final_layer_adaLN_modulation_1" in found.keys
    assert checked(tmp_path, "comfyui", "kohya", "flux1", layers=layers).as_trained


def test_rows_that_are_taken_for_others(tmp_path: Path) -> None:
    found = checked(tmp_path, "diffusers", "musubi-other", "flux2", layers=r"transformer_blocks\.0\.attn.*|norm_out.*")
    others = {layer for layer, verdict in found.layers.items() if verdict.reads == "differently"}
    assert others == {"final_layer.adaLN_modulation.1"}


def test_what_a_program_rejects_a_file_for(tmp_path: Path) -> None:
    found = checked(tmp_path, "diffusers", "kohya", "wan", layers=r"blocks\.\d+\.attn\d\.to_.*")
    assert "wants all layers of that kind, and lacks lora_unet_blocks_0_ffn_0" in found.keys
    whole = r"blocks\.\d+\.(attn\d\.to_.*|ffn.*)"
    assert checked(tmp_path, "diffusers", "kohya", "wan", layers=whole).as_trained
    found = checked(tmp_path, "diffusers", "kohya", "wan", layers=f"{whole}|proj_out")
    assert "diffusers rejects the file for lora_unet_head_head" in found.keys
    assert not found.as_trained


def of_encoders(folder: Path, program: str, dialect: str, family: str, *components: str) -> ProgramCheck:
    layouts = {}
    for component in components:
        name = FAMILIES[family].components[component]
        outlines = {"text_encoder_2": {"sdxl": "clip-bigg"}}.get(component, {})
        layouts[component] = layout_of(name, outlines.get(family))
    bundles = {component: bundle_of(layout) for component, layout in layouts.items()}
    write(bundles, folder / "te.safetensors", dialect, model=layouts, family=family)
    return check(folder / "te.safetensors", program)


@pytest.mark.parametrize("program", ["comfyui", "webui", "forge", "invokeai", "diffusers"])
def test_a_file_of_text_encoders_alone(program: str, tmp_path: Path) -> None:
    assert of_encoders(tmp_path, program, "kohya", "sdxl", "text_encoder", "text_encoder_2").as_trained


def test_text_encoders_that_a_program_does_not_know(tmp_path: Path) -> None:
    assert of_encoders(tmp_path, "comfyui", "kohya", "flux1", "text_encoder_2").as_trained
    found = of_encoders(tmp_path, "invokeai", "kohya", "flux1", "text_encoder_2")
    assert "InvokeAI rejects the file for lora_te3_" in found.keys
    assert "WebUI does not know keys of the format kohya for t5" in (
        of_encoders(tmp_path, "webui", "kohya", "flux1", "text_encoder_2").keys
    )


def test_diffusers_by_format_and_family(tmp_path: Path) -> None:
    for dialect, reads in (("diffusers", "as trained"), ("kohya", "differently")):
        found = checked(tmp_path, "diffusers", dialect, "flux1", (DoRA(inner=LoRA(rank=1)),), BLOCK)
        assert {each.reads for each in found.layers.values()} == {reads}
    for family, reads in (("flux2", "as trained"), ("flux1", "not at all")):
        found = checked(tmp_path, "diffusers", "lycoris", family, (LoKr(rank=4, factor=-1),), BLOCK)
        assert {each.reads for each in found.layers.values()} == {reads}


def test_invokeai_takes_dots_of_paths_for_those_of_tensors(tmp_path: Path) -> None:
    for dialect, reads in (("kohya", "as trained"), ("comfyui", "not at all")):
        found = checked(tmp_path, "invokeai", dialect, "qwen-image", (LoHa(rank=1),), BLOCK)
        assert found.as_trained == (reads == "as trained")
        assert ("the last two dots" in found.keys) == (reads != "as trained")


def test_a_bias_beside_a_lora(tmp_path: Path) -> None:
    stack = (LoRA(rank=1), Full(weight=False))
    reads = {"comfyui": "as trained", "webui": "not at all", "invokeai": "differently", "diffusers": "differently"}
    for program, expected in reads.items():
        found = checked(tmp_path, program, "kohya", "flux1", stack, BLOCK)
        assert {each.reads for each in found.layers.values()} == {expected}, program


def test_a_scale_that_is_not_what_was_trained(tmp_path: Path) -> None:
    layout, path = layout_of("flux1"), tmp_path / "a.safetensors"
    tensors = compose(bundle_of(layout, (LoRA(rank=2),), BLOCK), "kohya", model=layout).tensors
    save_file(tensors, path, metadata={"ss_network_args": '{"algo": "dylora", "block_size": "2"}'})
    found = check(path, "comfyui")
    assert {each.reads for each in found.layers.values()} == {"differently"}
    assert "its DyLoRA was trained at 2 times the stored scale" in str(found)
    assert "an export makes it right: written with the scale that was trained" in str(found)


def test_how_many_keys_forge_lets_by(tmp_path: Path) -> None:
    for layers, reads in (("img_in|x_embedder", True), (r"(single_)?transformer_blocks\.0\..*", False)):
        found = checked(
            tmp_path, "forge", "kohya", "flux1", (OFT(block_size=4),), f"{layers}|context_embedder|proj_out"
        )
        assert (found.keys == "") == reads
        assert {each.reads for each in found.layers.values()} == {"not at all"}
    assert "Forge rejects a file of which it does not know" in found.keys


def test_what_one_folder_of_pefts_does_not_hold(tmp_path: Path) -> None:
    layout, path = layout_of("flux1"), tmp_path / "a.safetensors"
    mixed = bundle_of(layout, layers=BLOCK)
    mixed.entries.update(bundle_of(layout, (LoHa(rank=1),), r"single_transformer_blocks\.0\..*").entries)
    write(mixed, path, "lycoris", model=layout)
    found = check(path, "peft")
    assert {each.reads for each in found.layers.values()} == {"not at all"}
    assert "it knows peft" in found.keys
    assert "a PEFT adapter is all of one kind" in explain_folder_conflict(mixed)


def test_a_small_change_is_told_from_rounding() -> None:
    """T-LoRA's change is a small difference of two weights, which float32 would round away."""
    torch.manual_seed(0)
    g = describe(torch.nn.Linear(64, 64))
    assert g is not None
    weight = torch.randn(64, 64)
    tlora = TLoRA(rank=4)
    u, s, v = torch.linalg.svd(weight.double())
    start = {"q0": v[:4], "p0": u[:, :4], "lam0": s[:4].unsqueeze(0)}
    p = start | {name.removesuffix("0"): tensor * (1 + 1e-5) for name, tensor in start.items()}
    assert p.keys() == tlora.slots(g).keys()
    entry = Entry(tlora, g, p)
    assert adapt_affine(entry, Affine(weight.double(), None)).weight.isfinite().all()
    assert PROGRAMS["simpletuner"].judge(entry, Affine(weight, None)).reads == "as trained"
