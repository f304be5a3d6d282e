"""What a file is, told from names and shapes alone, for every family in every dialect."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lycoris import LoHa, LoKr, LoRA
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.errors import FileError
from lycoris.files import compose, detect, judge, resolve
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import NamedLayout
from lycoris.models.families import ARCHITECTURES, FAMILIES
from lycoris.models.families.family import Architecture

FILES = [name for name, each in DIALECTS.items() if not each.is_folder]
MODELS = [
    (family.name, outline)
    for family in FAMILIES.values()
    for outline in ARCHITECTURES[family.components[""]].outlines
    if family.name != "language-model"
]
ALIKE = (
    {"kohya", "musubi", "onetrainer-kohya", "kohya-diffusers", "onetrainer-legacy"},
    {"comfyui", "musubi-other", "onetrainer-comfy", "ai-toolkit"},
    {"diffusers", "onetrainer-diffusers", "ai-toolkit"},
    {"bare", "onetrainer-original"},
    {"lycoris"},
    {"processors", "bare"},
)
"""Dialects that one file may be of: for some families their names are the same."""


def shapes(
    outline: str, family: str, dialect: str, algorithm: Algorithm
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of a file with adapters on all linear layers, without a number in it."""
    where = NamedLayout.from_outline(ARCHITECTURES[FAMILIES[family].components[""]], outline)
    entries = {}
    for path, g in where.layers.items():
        if g.kind == "linear" and re.fullmatch(DIALECTS[dialect].layer_pattern or ".*", path):
            tensors = {name: torch.empty(slot.shape, device="meta") for name, slot in algorithm.slots(g).items()}
            entries[path] = (Entry(algorithm, g, tensors),)
    written = compose(Bundle(entries), dialect, model=where, family=family)
    return {name: tuple(tensor.shape) for name, tensor in written.tensors.items()}, written.header


USUAL = ("kohya", "comfyui")
"""Dialects that files of any family are found in, and here read for each of them."""
TYPICAL = "flux1"
"""The family that is here read in every dialect."""


def list_pairs() -> list[Any]:
    """Every model in every dialect: the first of each family in the usual ones, and one family in all, are quick."""
    first = [model for at, model in enumerate(MODELS) if model[0] != MODELS[at - 1][0]]
    return [
        pytest.param(*model, dialect, marks=() if dialect in USUAL or model[0] == TYPICAL else pytest.mark.slow)
        for model in first
        for dialect in FILES
    ] + [pytest.param(*model, "lycoris", marks=pytest.mark.slow) for model in MODELS if model not in first]


@pytest.mark.parametrize(("family", "outline", "dialect"), list_pairs())
def test_family_model_and_dialect(family: str, outline: str, dialect: str) -> None:
    names, header = shapes(outline, family, dialect, LoRA(rank=4))
    if not names:
        return
    found = judge(names, header)
    # FramePack has HunyuanVideo's layers and a few more: without those, either may be meant.
    assert found.family == family or {found.family, family} == {"hunyuanvideo", "framepack"}
    assert outline in found.candidates
    assert any({found.dialect, dialect} <= group for group in ALIKE), found.dialect
    assert found.confidence in ("certain", "likely")
    assert set(found.algorithms) == {"lora"}
    assert not found.strange


@pytest.mark.sample(8)
@pytest.mark.parametrize("layers", [r".*\.1\..*", pytest.param(".*", marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("family", [model[0] for at, model in enumerate(MODELS) if model[0] != MODELS[at - 1][0]])
def test_reading_for_the_model_that_was_found_chooses_the_same_format(family: str, layers: str) -> None:
    where = NamedLayout.from_outline(*of_family(family))
    for dialect in FILES:
        written = encode_layers(where, family, dialect, layers)
        if not written:
            continue
        found = judge({name: tuple(tensor.shape) for name, tensor in written.items()}, {})
        if found.family == family:
            assert resolve(written, where).report.dialect == found.dialect, dialect


def of_family(family: str) -> tuple[Architecture, str]:
    architecture = ARCHITECTURES[FAMILIES[family].components[""]]
    return architecture, architecture.outlines[0]


def encode_layers(where: NamedLayout, family: str, dialect: str, layers: str) -> dict[str, Tensor]:
    """A file of LoRA on some linear layers, without a header."""
    algorithm, entries = LoRA(rank=1), {}
    for path, g in where.layers.items():
        if (
            g.kind == "linear"
            and re.fullmatch(layers, path)
            and re.fullmatch(DIALECTS[dialect].layer_pattern or ".*", path)
        ):
            tensors = {name: torch.ones(1).expand(slot.shape) for name, slot in algorithm.slots(g).items()}
            entries[path] = (Entry(algorithm, g, tensors),)
    return dict(compose(Bundle(entries), dialect, model=where, family=family).tensors) if entries else {}


@pytest.mark.sample(30)
@pytest.mark.parametrize(
    ("family", "outline", "algorithm"),
    [(*model, each) for model in MODELS for each in (LoHa(rank=2), LoKr(rank=4))],
)
def test_sizes_from_other_algorithms(family: str, outline: str, algorithm: Algorithm) -> None:
    found = judge(*shapes(outline, family, "lycoris", algorithm))
    assert found.family == family
    assert set(found.algorithms) == {algorithm.name}


def test_a_file_of_many_layers_is_judged_at_once() -> None:
    """Hundreds of layers times all models: fast enough to wait for."""
    given = shapes("hunyuanvideo-1.5", "hunyuanvideo-1.5", "kohya", LoRA(rank=4))
    judge(*given)
    start = time.process_time()
    judge(*given)
    assert time.process_time() - start < 30


def test_headers_decide_between_models_with_the_same_layers() -> None:
    """A few blocks are in Flux.1 and in HunyuanVideo."""
    names = {
        f"lora_unet_double_blocks_{at}_img_attn_qkv.{suffix}": shape
        for at in range(2)
        for suffix, shape in (("lora_up.weight", (9216, 4)), ("lora_down.weight", (4, 3072)), ("alpha", ()))
    }
    plain = judge(names, {})
    assert len(plain.candidates) > 1
    assert judge(names, {"ss_base_model_version": "flux1"}).family == "flux1"
    assert judge(names, {"modelspec.architecture": "hunyuan-video/lora"}).family == "hunyuanvideo"


def test_components_are_counted_as_the_family_does() -> None:
    names: dict[str, tuple[int, ...]] = {}
    for layer in ("lora_unet_double_blocks_0_img_mod_lin", "lora_unet_single_blocks_37_modulation_lin"):
        rows = 18432 if "double" in layer else 9216
        names |= {f"{layer}.lora_up.weight": (rows, 4), f"{layer}.lora_down.weight": (4, 3072)}
    t5 = "encoder_block_0_layer_0_SelfAttention_q"
    for prefix in ("lora_te2", "lora_te3"):
        own = {f"{prefix}_{t5}.lora_up.weight": (4096, 4), f"{prefix}_{t5}.lora_down.weight": (4, 4096)}
        found = judge(names | own, {"ss_base_model_version": "flux1"})
        assert found.components == {"": 2, "text_encoder_2": 1}
        assert found.models["text_encoder_2"] == "t5-xxl"


def test_a_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.gate": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"x\.safetensors: none of its 1 keys is of an adapter: model\.layers\.0"):
        detect(tmp_path / "x.safetensors")
