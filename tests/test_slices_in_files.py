"""An adapter of a fused layer in a file, and on the layers that have its rows: the same tensors in both."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from cases import ALGORITHMS, perturb, relative
from lycoris import BOFT, AdapterSet, DoRA, LoRA, Rule, plan, read, write
from lycoris.adapters.adapter import Adapter
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.layer_below import BareWeight
from lycoris.algorithms.slices import AdditiveSlice, Slice, fused_entry
from lycoris.algorithms.tensors import write_tensors
from lycoris.errors import ConfigError, FileError
from lycoris.files import encode, resolve
from lycoris.files.layout import NamedLayout
from lycoris.files.peft.writing import encode_peft
from lycoris.layers.geometry import Affine
from lycoris.ops.equality import same

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::transformers")


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    torch.manual_seed(0)
    return tiny.flux_transformer().eval()


@pytest.fixture(scope="module")
def original(flux: nn.Module) -> NamedLayout:
    """The same model under its publisher's names, where projections are fused and halves exchanged."""
    return NamedLayout.from_model(flux).convert_to_naming("original")


FUSED = ("single_blocks.0.linear1", "double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1")


def file_of(algorithm: Algorithm, layout: NamedLayout, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """As a program that has the published model writes it, with tensors that have an effect."""
    torch.manual_seed(zlib.crc32(str(algorithm).encode()))
    found = {}
    for path in FUSED:
        g = layout.layers[path]
        try:
            algorithm.check(g)
        except ConfigError:
            continue
        adapter = Adapter(algorithm, g)
        adapter.initialize(BareWeight(g, torch.randn(g.shape)))
        tensors = {name: (t + 0.3 * torch.randn_like(t)).to(dtype) for name, t in adapter.whole().items()}
        own = write_tensors(algorithm, tensors, g)
        found |= {f"diffusion_model.{path}.{name}": tensor for name, tensor in own.items()}
    return found


def values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith((".alpha", ".on_input"))}


def is_mixed(algorithm: Algorithm) -> bool:
    """Whether all rows of a layer depend on each other."""
    return isinstance(algorithm, BOFT) or (isinstance(algorithm, DoRA) and algorithm.axis == "in")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "norm"])
def test_the_file_that_is_written_is_the_one_that_was_read(
    name: str, dtype: torch.dtype, flux: nn.Module, original: NamedLayout, tmp_path: Path
) -> None:
    tensors = file_of(ALGORITHMS[name], original, dtype)
    if not tensors:
        return
    save_file(tensors, tmp_path / "a.safetensors")
    if is_mixed(ALGORITHMS[name]) and any("linear1" in key for key in tensors):
        with pytest.raises(FileError, match="without the base model's weights"):
            read(tmp_path / "a.safetensors", flux)
        return
    bundle = read(tmp_path / "a.safetensors", flux)
    assert not bundle.report.changed
    write(bundle, tmp_path / "b.safetensors", "comfyui", model=flux)
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == tensors.keys()
    odd = [key for key in values(tensors) if not same({"": again[key]}, {"": tensors[key]})]
    assert not odd
    assert all(again[key] == tensor for key, tensor in tensors.items() if key.endswith(".alpha"))


@pytest.mark.parametrize("name", ["lora", "lokr", "loha", "full-weight", "glora", "ia3", "dora-lokr"])
def test_training_goes_into_the_file(name: str, flux: nn.Module, original: NamedLayout) -> None:
    tensors = file_of(ALGORITHMS[name], original, torch.float32)
    adapters = AdapterSet.load(flux, resolve(tensors, flux, "comfyui"))
    groups = {adapter.group for stack in adapters.stacks.values() for adapter in stack}
    assert None not in groups - {adapters.stacks["norm_out.linear"][0].group}
    perturb(adapters)
    again = encode(adapters.bundle(), "comfyui", model=flux)
    assert again.keys() == tensors.keys()
    assert all(again[key].shape == tensor.shape for key, tensor in tensors.items())
    assert not any(torch.equal(again[key], tensor) for key, tensor in values(tensors).items())
    # What is read again does what was trained.
    one, other = adapters.bundle().entries, resolve(again, flux, "comfyui").entries
    assert all(same(fused_entry(one[path][0]).tensors, fused_entry(other[path][0]).tensors) for path in one)


def test_a_layer_takes_what_its_file_takes(flux: nn.Module, original: NamedLayout) -> None:
    tensors = file_of(ALGORITHMS["lokr-factor"], original)
    bundle = resolve(tensors, flux, "comfyui")
    pieces = {t.data_ptr(): t.nbytes for (entry,) in bundle.entries.values() for t in entry.tensors.values()}
    assert sum(pieces.values()) == sum(tensor.nbytes for tensor in values(tensors).values())
    alone = resolve(tensors, flux, "comfyui", shared=False)
    assert alone.report.changed
    assert not any(isinstance(e.algorithm, Slice) for stack in alone.entries.values() for e in stack)


def test_some_of_the_layers_are_written_as_rows_of_their_own(flux: nn.Module, original: NamedLayout) -> None:
    tensors = file_of(LoRA(rank=2), original, torch.float32)
    bundle = resolve(tensors, flux, "comfyui")
    gone = "single_transformer_blocks.0.attn.to_k"
    fewer = replace(bundle, entries={path: stack for path, stack in bundle.entries.items() if path != gone})
    again = resolve(encode(fewer, "comfyui", model=flux), flux, "comfyui")
    for path, (entry,) in again.entries.items():
        g = entry.geometry
        zeros = Affine(torch.zeros(g.shape), torch.zeros(g.out_features))
        (before,) = bundle.entries[path]
        expected = before.algorithm.transform(before.tensors, zeros, g).weight * (path != gone)
        assert relative(entry.algorithm.transform(entry.tensors, zeros, g).weight + 1, expected + 1) < 1e-6


def test_formats_of_layers_get_adapters_of_their_own(flux: nn.Module, original: NamedLayout) -> None:
    bundle = resolve(file_of(LoRA(rank=2), original, torch.float32), flux, "comfyui")
    assert "lycoris_single_transformer_blocks_0_attn_to_k.lora_up.weight" in encode(bundle, "lycoris", model=flux)
    tensors, config = encode_peft(bundle, flux)
    assert config["peft_type"] == "LORA"
    assert any("single_transformer_blocks.0.attn.to_k.lora_B" in name for name in tensors)


def test_adapters_of_the_layers_own_take_their_rows(flux: nn.Module, original: NamedLayout) -> None:
    bundle = resolve(file_of(LoRA(rank=2), original, torch.float32), flux, "comfyui")
    rule = Rule(LoRA(rank=2), path="single_transformer_blocks.*to_[qkv]")
    adapters = AdapterSet.build(flux, plan(flux, rule))
    own = {path: stack for path, stack in bundle.entries.items() if path in adapters.stacks}
    adapters.fill(replace(bundle, entries=own))
    for path, (adapter,) in adapters.stacks.items():
        (entry,) = own[path]
        assert isinstance(entry.algorithm, AdditiveSlice)
        g = entry.geometry
        zeros = Affine(torch.zeros(g.shape), None)
        expected = entry.algorithm.transform(entry.tensors, zeros, g).weight
        assert relative(adapter.adapt_affine(zeros).weight, expected) < 1e-6


def test_two_sets_of_slices_on_one_model(flux: nn.Module, original: NamedLayout) -> None:
    x: Any = torch.randn(1, 4, flux.single_transformer_blocks[0].attn.to_q.in_features)
    layer = flux.single_transformer_blocks[0].attn.to_q
    before = layer(x)
    sets = [
        AdapterSet.load(flux, resolve(file_of(ALGORITHMS[name], original), flux, "comfyui"), name).attach()
        for name in ("lokr", "lora")
    ]
    y = layer(x)
    sets[0].detach()
    sets[1].detach()
    assert torch.equal(layer(x), before)
    assert not torch.equal(y, before)
