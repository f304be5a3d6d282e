"""Conversions and sizes: nothing grows unasked, ways back end where they began, and guesses are not written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lycoris import read
from lycoris.files import convert, detect, judge, read_header
from lycoris.files.growth import GrowthError, format_bytes
from lycoris.models import outline

RANK = 4
Shape = tuple[int, ...]
DEV = {"modelspec.architecture": "flux-1-dev/lora"}


def fill_tensors(shapes: dict[str, Shape], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=drawn).to(dtype) if shape else torch.tensor(float(RANK))
        for name, shape in shapes.items()
    }


def lora(prefix: str, layers: dict[str, tuple[int, int]]) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, (rows, columns) in layers.items():
        found |= {f"{prefix}{name}.lora_down.weight": (RANK, columns), f"{prefix}{name}.lora_up.weight": (rows, RANK)}
        found[f"{prefix}{name}.alpha"] = ()
    return found


SPLIT = {f"transformer_blocks_0_attn_{name}": (3072, 3072) for name in ("to_q", "to_k", "to_v", "to_out_0")}
FUSED = {"double_blocks_0_img_attn_qkv": (9216, 3072), "single_blocks_0_linear1": (21504, 3072)}
LOKR: dict[str, Shape] = {
    f"lycoris_{layer}.{name}": shape
    for layer in SPLIT
    for name, shape in (("lokr_w1", (12, 12)), ("lokr_w2", (256, 256)), ("alpha", ()))
}
LINEAR1: dict[str, Shape] = {
    f"diffusion_model.single_blocks.0.linear1.{name}": shape
    for name, shape in (("lokr_w1", (32, 32)), ("lokr_w2", (672, 96)), ("alpha", ()))
}


def same(one: Path, other: Path) -> None:
    before, after = load_file(one), load_file(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_file_that_is_right_stays_what_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(fill_tensors(LOKR), source, DEV | {"lycoris_config": "{}"})
    done = convert(source, target, portable="comfyui")
    same(source, target)
    assert read_header(target).metadata["lycoris_config"] == "{}"
    assert "the tensors and their names are those of the source" in str(done)


@pytest.mark.parametrize(
    ("shapes", "to"),
    [
        pytest.param(LOKR, "kohya", id="joined"),
        pytest.param(LINEAR1, "lycoris", id="cut", marks=pytest.mark.slow),
    ],
)
def test_nothing_grows_unasked(shapes: dict[str, Shape], to: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(fill_tensors(shapes), source, DEV)
    with pytest.raises(GrowthError, match=r"grow from .* to about \d.* (MB|GB) \(.* times as large\): lokr became a"):
        convert(source, target, to)
    assert not target.exists()


def test_what_is_predicted_is_what_is_written(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    layers = {f"transformer_blocks_{at}_attn_{name}": (3072, 3072) for at in range(3) for name in ("to_q", "to_k")}
    save_file(fill_tensors(lora("lycoris_", layers)), source, DEV)
    with pytest.raises(GrowthError) as caught:
        convert(source, target, "kohya")
    done = convert(source, target, "kohya", allow_growth=True)
    alphas = sum(tensor.nbytes for name, tensor in done.written.tensors.items() if name.endswith("alpha"))
    assert f"to about {format_bytes(done.after.tensors - alphas)} (" in str(caught.value)
    assert "layers: 6 lora of rank 4; now 3 lora of rank 8" in str(done)


@pytest.mark.slow
def test_programs_get_nothing_that_grows_either(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(fill_tensors(LINEAR1), source, DEV)
    with pytest.raises(GrowthError) as caught:
        convert(source, target, portable="simpletuner")
    assert len(str(caught.value).splitlines()) <= 15
    assert not target.exists()


def test_a_precision_that_is_asked_for_is_no_growth(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(fill_tensors(lora("lora_unet_", FUSED)), source, DEV)
    convert(source, target, "comfyui", dtype=torch.float32)
    assert target.stat().st_size > 1.9 * source.stat().st_size
    rounded = convert(target, tmp_path / "c.safetensors", "kohya", dtype=torch.bfloat16)
    assert "exact but for 4 tensors rounded to bfloat16" in str(rounded)


@pytest.mark.parametrize(
    ("layers", "prefix", "dialect", "through"),
    [
        (FUSED, "lora_unet_", "kohya", "kohya-diffusers"),
        (FUSED, "lora_unet_", "kohya", "diffusers"),
        (SPLIT, "lycoris_", "lycoris", "kohya"),
        (SPLIT, "lycoris_", "lycoris", "comfyui"),
    ],
)
def test_there_and_back(
    layers: dict[str, tuple[int, int]], prefix: str, dialect: str, through: str, tmp_path: Path
) -> None:
    """Parts that share an input factor share it again, and ranks that only other parts had are gone."""
    first, there, back = (tmp_path / f"{name}.safetensors" for name in "abc")
    save_file(fill_tensors(lora(prefix, layers)), first, DEV)
    convert(first, there, through, allow_growth=True)
    convert(there, back, dialect)
    same(first, back)


def test_guesses_are_not_written(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(fill_tensors(lora("lora_unet_", FUSED)), source, DEV)
    assert detect(source).models == {"": "flux.1-dev"}
    done = convert(source, target, "comfyui")
    told = read_header(target).metadata
    assert "lycoris_base" not in told
    assert "flux.1-dev" in str(done)
    assert "schnell" not in str(done) + json.dumps(dict(told))
    for name in ("flux.1-dev", "flux.1-schnell"):
        assert read(target, outline.load_model(name)).report.remarks == ()


def test_variants_stay_open() -> None:
    found = judge(lora("lora_unet_", FUSED), {"ss_base_model_version": "flux1"})
    assert found.family == "flux1"
    assert set(found.variants().split(" or ")) >= {"flux.1-dev", "flux.1-schnell"}


def test_a_base_of_no_known_family_is_not_taken_for_one() -> None:
    found = judge(lora("lora_unet_", FUSED), {"modelspec.architecture": "nothing-known/lora"})
    assert (found.family, found.confidence) == (None, "unsure")
    assert "modelspec.architecture = nothing-known/lora, which is no known family" in str(found)


def test_headers_that_name_two_families() -> None:
    found = judge(lora("lora_unet_", FUSED), {"ss_base_model_version": "flux1", "modelspec.architecture": "sdxl/lora"})
    assert "its header names several bases: flux1 (ss_base_model_version), sdxl (modelspec.architecture)" in str(found)


def test_sizes_decide_as_well_as_names() -> None:
    """All of a model's names, with other sizes: no model is called likely."""
    layers = {f"double_blocks_{at}_img_attn_{part}": (90, 30) for at in range(19) for part in ("qkv", "proj")}
    found = judge(lora("lora_unet_", layers), {})
    assert found.confidence == "unsure"
    assert "have other sizes than" in str(found)
