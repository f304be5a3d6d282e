"""`convert` for a program and `check` by that program: what the one writes, the other finds to be as trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cases import relative
from lycoris import DoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, read, write
from lycoris.algorithm import Affine, Algorithm
from lycoris.bundle import Bundle, Entry
from lycoris.errors import FileError
from lycoris.files import check, convert, detect
from lycoris.files.consumers import CONSUMERS
from lycoris.files.families import ARCHITECTURES, FAMILIES
from lycoris.files.layout import Layout
from lycoris.recast import adapted

ATTENTION = r"(?!(up|mid)_block|down_blocks\.[02]).*\b(blocks|layers|block|transformer_blocks)\.0\..*(attn|attention|SelfAttention).*"
ENDS = r"(?!.*\d\.).*"
"""What is in no block."""
BLOCK = r"(single_)?transformer_blocks\.0\..*"
FAMILY = {family.components[""]: name for name, family in reversed(FAMILIES.items())}


def source(
    folder: Path,
    architecture: str,
    *algorithms: Algorithm,
    layers: str = ".*",
    dialect: str = "lycoris",
    kind: str = "linear",
) -> Path:
    """A file with the same algorithms on some layers of a known model."""
    torch.manual_seed(0)
    layout = Layout.known(ARCHITECTURES[architecture], ARCHITECTURES[architecture].outlines[0])
    entries = {
        name: tuple(
            Entry(a, g, {slot: torch.randn(s.shape) for slot, s in a.slots(g).items()})
            for a in algorithms or (LoRA(rank=1),)
        )
        for name, g in layout.layers.items()
        if re.fullmatch(layers, name) and g.kind == kind
    }
    path = folder / f"{architecture}.safetensors"
    write(Bundle(entries), path, dialect, model=layout, family=FAMILY[architecture])
    return path


def agrees(path: Path, program: str, to: str | None = None) -> bool:
    """Whether it is written, which it is if and only if the program then reads it as trained."""
    out = path.with_name("out")
    try:
        convert(path, out, to, portable=program)
    except FileError:
        assert not out.exists(), (program, to)
        return False
    found = check(out, program)
    assert found.as_trained, (program, to, str(found))
    if out.is_file():
        out.unlink()
    return True


@pytest.mark.parametrize("layers", [ATTENTION, f"{ATTENTION}|{ENDS}"], ids=["attention", "ends"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_what_is_written_is_read_as_trained(architecture: str, layers: str, tmp_path: Path) -> None:
    path = source(tmp_path, architecture, layers=layers)
    for program in CONSUMERS.keys() - {"peft"}:
        agrees(path, program)
    assert agrees(path, "simpletuner")


@pytest.mark.parametrize(
    ("architecture", "layers", "program"),
    [
        ("flux1", f"{BLOCK}|{ENDS}", "invokeai"),
        ("flux1", f"{BLOCK}|{ENDS}", "comfyui"),
        ("flux1", f"{BLOCK}|{ENDS}", "musubi"),
        ("wan", rf"blocks\.0\..*|{ENDS}", "invokeai"),
        ("wan", rf"blocks\.0\..*|{ENDS}", "diffusers"),
        ("z-image", rf"layers\.0\..*|{ENDS}", "comfyui"),
    ],
)
def test_every_dialect(architecture: str, layers: str, program: str, tmp_path: Path) -> None:
    path = source(tmp_path, architecture, layers=layers)
    good = [to for to in CONSUMERS[program].keys if agrees(path, program, to)]
    assert agrees(path, program) == bool(good)


def test_the_first_dialect_that_passes(tmp_path: Path) -> None:
    """InvokeAI rejects kohya's files for the layers outside of Flux.1's blocks, and reads those of diffusers."""
    path, out = source(tmp_path, "flux1", layers=f"{BLOCK}|{ENDS}"), tmp_path / "out.safetensors"
    convert(path, out, portable="invokeai")
    assert detect(out).dialect == "diffusers"
    with pytest.raises(FileError) as caught:
        convert(path, tmp_path / "no.safetensors", "kohya", portable="invokeai")
    assert "kohya: InvokeAI rejects the file for lora_unet_guidance_in" in str(caught.value)
    assert "\nAs diffusers or musubi-other or " in str(caught.value)
    with pytest.raises(FileError, match="musubi-tuner has no place for such keys"):
        convert(path, tmp_path / "no.safetensors", portable="musubi")
    with pytest.raises(FileError, match="(?s)has no place for such keys.*Nor does it in any other format"):
        convert(path, tmp_path / "no.safetensors", "kohya", portable="musubi")
    assert not (tmp_path / "no.safetensors").exists()


def test_keys_decide_about_an_export(tmp_path: Path) -> None:
    """diffusers reads LoKr for Z-Image, but not on what the original code calls attention.out."""
    layers = r"layers\.0\.(attention\.to_out|feed_forward).*"
    path, out = source(tmp_path, "z-image", LoKr(rank=4, factor=-1), layers=layers), tmp_path / "out"
    convert(path, out, "comfyui", portable="diffusers")
    found = check(out, "diffusers")
    assert found.as_trained
    assert {layer for layer, name in found.algorithms.items() if name == "lora"} == {"layers.0.attention.out"}
    assert len(found.layers) == 4


def test_a_folder_of_pefts_has_the_models_own_names(tmp_path: Path) -> None:
    path = source(tmp_path, "flux1", layers=BLOCK, dialect="kohya")
    convert(path, tmp_path / "folder", portable="peft")
    assert check(tmp_path / "folder", "peft").as_trained
    layers = {key.partition("base_model.model.")[2].rsplit(".", 2)[0] for key in load_file(
        tmp_path / "folder" / "adapter_model.safetensors"
    )}  # fmt: skip
    layout = Layout.known(ARCHITECTURES["flux1"], "flux.1-dev")
    assert layers == {name for name, g in layout.layers.items() if re.fullmatch(BLOCK, name) and g.kind == "linear"}
