"""How each dialect calls the layers of each family: names that other programs are known to read, written out."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from layer_names import EXPECTED

from lycoris import DoRA, LoKr, LoRA
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Entry
from lycoris.errors import FileError
from lycoris.files import compose, resolve
from lycoris.files.layout import NamedLayout
from lycoris.models.families import FAMILIES

UP = ".lora_up.weight"


@pytest.mark.parametrize(("family", "component", "model", "layer", "dialect", "name"), EXPECTED)
def test_names(family: str, component: str, model: str, layer: str, dialect: str, name: str) -> None:
    from lycoris.models.families import ARCHITECTURES

    where = NamedLayout.from_outline(ARCHITECTURES[FAMILIES[family].components[component]], model)
    geometry = where.layers[layer]
    algorithm = LoRA(rank=2)
    tensors = {slot: torch.ones(what.shape) for slot, what in algorithm.slots(geometry).items()}
    bundle = Bundle({layer: (Entry(algorithm, geometry, tensors),)})
    written = compose(bundle, dialect, component=component, model=where, family=family)
    layers = {key.removesuffix(".weight").rpartition(".")[0] for key in written.tensors}
    assert layers == {name}
    read = resolve(written.tensors, where, metadata=written.header, component=component, family=family)
    assert read.entries.keys() >= {layer}


def test_every_family_and_every_dialect_has_a_name_here() -> None:
    from lycoris.files.dialects import DIALECTS

    assert {row[0] for row in EXPECTED} | {"sd2", "language-model"} >= set(FAMILIES)
    unnamed = {"peft", "onetrainer-diffusers", "onetrainer-kohya", "onetrainer-comfy", "bare"}
    assert {row[4] for row in EXPECTED} | unnamed >= set(DIALECTS)


@pytest.mark.parametrize("adapter", ["default", "my_adapter"])
def test_names_of_adapters_in_names_of_tensors(adapter: str) -> None:
    """What a model in PEFT's hands has in its own state dict, saved by hand."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6))
    lora = {f"0.lora_A.{adapter}.weight": torch.ones(2, 4), f"0.lora_B.{adapter}.weight": torch.ones(6, 2)}
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    loha = {f"1.hada_{name}.{adapter}": torch.ones((6, 2) if name.endswith("a") else (2, 6)) for name in names}
    tensors = {f"base_model.model.{key}": tensor for key, tensor in (lora | loha).items()}
    found = resolve(tensors, model)
    assert "its scale is assumed to be 1" in str(found.report)
    assert not found.report.unused
    assert [entry.algorithm.name for (entry,) in found.entries.values()] == ["lora", "loha"]
    two = tensors | {"base_model.model.0.lora_A.other.weight": torch.zeros(2, 4)}
    with pytest.raises(FileError, match="are the same tensor under two names"):
        resolve(two, model, strict=False)


SPELLED = {
    "kohya": ("lora_unet_double_blocks_0_img_mlp_0", "lora_down.weight", "lora_up.weight", "alpha"),
    "diffusers": ("transformer.transformer_blocks.0.ff.net.0.proj", "lora_A.weight", "lora_B.weight"),
    "musubi-other": ("diffusion_model.double_blocks.0.img_mlp.0", "lora_A.weight", "lora_B.weight"),
    "onetrainer-comfy": ("diffusion_model.double_blocks.0.img_mlp.0", "lora_A.weight", "lora_B.weight", "alpha"),
    "onetrainer-diffusers": ("transformer.transformer_blocks.0.ff.net.0.proj", "lora_A.weight", "lora_B.weight"),
    "ai-toolkit": ("transformer.transformer_blocks.0.ff.net.0.proj", "lora_A.weight", "lora_B.weight"),
    "comfyui": ("diffusion_model.double_blocks.0.img_mlp.0", "lora_down.weight", "lora_up.weight", "alpha"),
}


@pytest.mark.parametrize("dialect", SPELLED)
def test_tensors_and_scale(dialect: str) -> None:
    """Without alpha in the file, its two factors multiply to what they are trained as."""
    from lycoris.models.families import ARCHITECTURES

    where, layer = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-dev"), "transformer_blocks.0.ff.net.0.proj"
    algorithm, geometry = LoRA(rank=4, alpha=1.0), where.layers[layer]
    p = {slot: torch.randn(what.shape, dtype=torch.float64) for slot, what in algorithm.slots(geometry).items()}
    written = compose(Bundle({layer: (Entry(algorithm, geometry, p),)}), dialect, model=where)
    name, down, up, *alpha = SPELLED[dialect]
    assert set(written.tensors) == {f"{name}.{suffix}" for suffix in (down, up, *alpha)}
    some = torch.randn(geometry.shape[1], 3, dtype=torch.float64)
    product = written.tensors[f"{name}.{up}"] @ (written.tensors[f"{name}.{down}"] @ some)
    inside = 1.0 if alpha or dialect == "diffusers" else 0.25
    assert torch.allclose(product, p["up"] @ (p["down"] @ some) * inside, rtol=1e-12)


LENGTHS = [
    ("diffusers", "out", "lora_magnitude_vector", (3072,)),
    ("onetrainer-diffusers", "out", "lora_magnitude_vector", (3072,)),
    ("onetrainer-diffusers", "in", "dora_scale", (1, 12288)),
    ("onetrainer-comfy", "out", "dora_scale", (3072, 1)),
    ("onetrainer-kohya", "in", "dora_scale", (1, 12288)),
    ("comfyui", "out", "dora_scale", (3072, 1)),
    ("kohya", "out", "dora_scale", (3072, 1)),
]


@pytest.mark.parametrize(("dialect", "axis", "name", "shape"), LENGTHS)
def test_lengths_of_dora(dialect: str, axis: Literal["out", "in"], name: str, shape: tuple[int, ...]) -> None:
    from lycoris.models.families import ARCHITECTURES

    where, layer = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-dev"), "transformer_blocks.0.ff.net.2"
    algorithm, geometry = DoRA(inner=LoRA(rank=2), axis=axis), where.layers[layer]
    p = {slot: torch.randn(what.shape) for slot, what in algorithm.slots(geometry).items()}
    written = compose(Bundle({layer: (Entry(algorithm, geometry, p),)}), dialect, model=where)
    ((key, lengths),) = [item for item in written.tensors.items() if item[0].endswith(("_vector", "dora_scale"))]
    assert key.rpartition(".")[2] == name
    assert lengths.shape == shape
    ((entry,),) = resolve(written.tensors, where, metadata=written.header).entries.values()
    assert isinstance(entry.algorithm, DoRA)
    assert entry.algorithm.axis == axis
    assert torch.equal(entry.tensors["magnitude"], p["magnitude"])


def test_a_foreign_reading_of_lokr_is_none_of_musubis() -> None:
    """What musubi's converter leaves alone: alpha stays for everything but LoRA."""
    from lycoris.models.families import ARCHITECTURES

    where, layer = NamedLayout.from_outline(ARCHITECTURES["flux1"], "flux.1-dev"), "transformer_blocks.0.ff.net.0.proj"
    algorithm, geometry = LoKr(rank=2, alpha=1.0), where.layers[layer]
    p = {slot: torch.randn(what.shape) for slot, what in algorithm.slots(geometry).items()}
    written = compose(Bundle({layer: (Entry(algorithm, geometry, p),)}), "musubi-other", model=where)
    assert "diffusion_model.double_blocks.0.img_mlp.0.alpha" in written.tensors
