"""LoRA files under the names of published code, converted here and by diffusers: the same keys and the same values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import load_file, save_file
from torch import Tensor

from lycoris.files import convert
from lycoris.files.skeleton import list_namings, load_skeleton, name_layers
from lycoris.models import outline
from lycoris.models.families import ARCHITECTURES

RANK = 2


def few(name: str) -> bool:
    """Whether a layer is in none but the first two blocks."""
    return all(int(number) < 2 for number in re.findall(r"(?<![^.])\d+(?![^.])", name.replace("net.2", "net")))


def lora(model: str, naming: str, prefix: str, inside: str) -> Iterator[tuple[str, Tensor]]:
    """Distinct numbers for every linear layer of the first blocks whose name a pattern matches."""
    architecture = next(each for each in ARCHITECTURES.values() if model in each.outlines)
    layers = load_skeleton(model)
    for at, (name, span) in enumerate(name_layers(layers, list_namings(architecture)[naming]).items()):
        own = [layers[part] for part in span.parts]
        if own[0].kind == "linear" and few(name) and re.match(inside, name):
            rows = sum(each.out_features for each in own)
            yield f"{prefix}{name}.lora_A.weight", torch.full((RANK, own[0].fan_in), float(at + 1))
            yield f"{prefix}{name}.lora_B.weight", torch.arange(rows * RANK, dtype=torch.float32).reshape(rows, RANK)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("model", "naming", "converter", "inside"),
    [
        ("hidream-i1", "diffusers", "_convert_non_diffusers_hidream_lora_to_diffusers", ""),
        # The two conversions below rename attention and feed-forwards; what else they hand on as it is called there.
        ("ltx-video-2b", "original", "_convert_non_diffusers_ltxv_lora_to_diffusers", "transformer_blocks"),
        ("flux.3", "original", "_convert_non_diffusers_flux3_lora_to_diffusers", r"\w+_blocks\."),
        ("ltx-2", "original", "_convert_non_diffusers_ltx2_lora_to_diffusers", ""),
        ("ltx-2.3", "original", "_convert_non_diffusers_ltx2_lora_to_diffusers", ""),
        ("cosmos-predict2-2b", "original", "_convert_non_diffusers_anima_lora_to_diffusers", ""),
        ("ideogram-4", "original", "_convert_non_diffusers_ideogram4_lora_to_diffusers", "layers"),
        ("krea-2", "original", "_convert_non_diffusers_krea2_lora_to_diffusers", ""),
        ("minimax-h3", "original", "_convert_non_diffusers_minimax_h3_lora_to_diffusers", ""),
    ],
)
def test_as_diffusers_converts_it(model: str, naming: str, converter: str, inside: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(dict(lora(model, naming, "diffusion_model.", inside)), source)
    convert(source, target, "diffusers", base=outline.load_model(model))
    found, expected = load_file(target), getattr(theirs, converter)(load_file(source))
    assert set(found) == set(expected)
    for name in (key.removesuffix("A.weight") for key in found if key.endswith("A.weight")):
        ours, wanted = (each[f"{name}B.weight"] @ each[f"{name}A.weight"][:, :1] for each in (found, expected))
        assert torch.equal(ours, wanted), name
