"""XLabs' LoRA of Flux.1: processors beside fused projections, as diffusers' own converter reads them."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from torch import Tensor

from lycoris.algorithms.slices import own_rows
from lycoris.files import judge, resolve
from lycoris.models import outline

WIDTH, MLP = 3072, 12288
SINGLE = {"qkv_lora": (3 * WIDTH, WIDTH), "proj_lora": (WIDTH, WIDTH + MLP)}
DOUBLE = {
    f"{name}{stream}": (rows, WIDTH)
    for name, rows in (("qkv_lora", 3 * WIDTH), ("proj_lora", WIDTH))
    for stream in (1, 2)
}


def file_of(prefix: str, single: bool, double: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    blocks = [(f"{prefix}single_blocks.{at}", SINGLE) for at in range(2 * single)]
    blocks += [(f"{prefix}double_blocks.{at}", DOUBLE) for at in range(2 * double)]
    return {
        f"{block}.processor.{name}.{way}.weight": torch.randn((rows, 2) if way == "up" else (2, columns))
        for block, layers in blocks
        for name, (rows, columns) in layers.items()
        for way in ("down", "up")
    }


@pytest.mark.sample(3)
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize(("single", "double"), [(True, False), (False, True), (True, True)])
def test_they_are_read_as_diffusers_does(prefix: str, single: bool, double: bool) -> None:
    tensors = file_of(prefix, single, double)
    entries = resolve(tensors, outline.load_model("flux.1-dev")).entries
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    layers = {name.removesuffix(".lora_A.weight") for name in theirs if name.endswith(".lora_A.weight")}
    assert {f"transformer.{path}" for path in entries} == layers
    for path, (entry,) in entries.items():
        # A slice has the fused layer's factors; its rows are cut out here.
        own = own_rows(entry)
        assert own is not None
        assert torch.equal(own.tensors["up"], theirs[f"transformer.{path}.lora_B.weight"])
        assert torch.equal(own.tensors["down"], theirs[f"transformer.{path}.lora_A.weight"])


def test_single_blocks_alone_are_told_by_their_sizes() -> None:
    found = judge({name: tuple(t.shape) for name, t in file_of("", True, False).items()}, {})
    assert (found.family, found.dialect) == ("flux1", "processors")
