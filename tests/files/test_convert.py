"""From one dialect to another, by files: what the adapters do to a model stays what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from cases import perturb, relative
from lycoris import IA3, OFT, AdapterSet, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, Rule, TLoRA, plan, read, write
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.errors import FileError
from lycoris.files import check, convert, detect, load_tensors, read_header, write_peft
from lycoris.files.container.model_weights import BaseWeights
from lycoris.files.programs import PROGRAMS
from lycoris.files.skeleton import load_skeleton

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::transformers", "ignore:::peft")

DIALECTS = (
    "lycoris",
    "kohya",
    "kohya-diffusers",
    "musubi",
    "comfyui",
    "onetrainer-comfy",
    "onetrainer-original",
    "bare",
)
"""That hold every algorithm on linear layers, or say that they do not."""


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    torch.manual_seed(0)
    return tiny.flux_transformer().eval()


def adapted(model: nn.Module, algorithm: Algorithm, path: str = "*attn.*") -> AdapterSet:
    torch.manual_seed(1)
    adapters = AdapterSet.build(model, plan(model, Rule(algorithm, path=path), strict=False))
    perturb(adapters)
    return adapters


def weights(model: nn.Module, adapters: AdapterSet) -> dict[str, Tensor]:
    """Of all layers, with the adapters merged."""
    adapters.merge()
    found = {name: p.detach().clone() for name, p in model.named_parameters() if "adapter_" not in name}
    adapters.unmerge()
    return found


def loaded(model: nn.Module, path: Path) -> dict[str, Tensor]:
    return weights(model, AdapterSet.load(model, read(path, model)))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one:
        assert relative(one[name], other[name]) < 1e-6, name


ALGORITHMS: dict[str, Algorithm] = {
    "lora": LoRA(rank=2, alpha=1.0),
    "loha": LoHa(rank=2, alpha=1.0),
    "lokr": LoKr(rank=1, alpha=0.5),
    "full": Full(bias=False),
    "dora": DoRA(inner=LoRA(rank=2)),
    "tlora": TLoRA(rank=2),
}


@pytest.mark.sample(3)
@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_around_the_houses(name: str, flux: nn.Module, tmp_path: Path) -> None:
    """Through one dialect after the other, fused and split and fused again, and back."""
    adapters = adapted(flux, ALGORITHMS[name], "*transformer_blocks.0.*")
    expected = weights(flux, adapters)
    at = tmp_path / "0.safetensors"
    write(adapters.bundle(), at, "lycoris")
    for i, dialect in enumerate(("comfyui", "kohya", "onetrainer-comfy", "kohya-diffusers", "bare", "lycoris")):
        then = tmp_path / f"{i + 1}.safetensors"
        convert(at, then, dialect, base=flux, allow_growth=True)
        same(loaded(flux, then), expected)
        at = then


def test_what_stays_fused_stays_what_it_is(flux: nn.Module, tmp_path: Path) -> None:
    """Between two dialects that have the fused layer nothing is taken apart."""
    adapters = adapted(flux, LoKr(rank=1))
    write(adapters.bundle(), tmp_path / "a.safetensors", "kohya")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfyui", base=flux)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", base=flux)
    before, after = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_into_diffusers_own_loader(tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline()
    pipe.transformer.eval()
    adapters = adapted(pipe.transformer, LoRA(rank=2, alpha=1.0), "*transformer_blocks.0.attn.*")
    write(adapters.bundle(), tmp_path / "a.safetensors", "kohya")
    inputs = flux_inputs()
    adapters.attach()
    expected = pipe.transformer(**inputs)[0]
    adapters.detach()
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", base=pipe.transformer)
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    assert relative(pipe.transformer(**inputs)[0], expected) < 1e-5


def flux_inputs() -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 4, 16),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }


@pytest.mark.sample(8)
@pytest.mark.parametrize("program", ["comfyui", "forge", "invokeai", "diffusers"])
@pytest.mark.parametrize(
    "algorithm", [DoRA(inner=LoRA(rank=2)), GLoRA(rank=2), IA3(), OFT(block_size=4, rescale=True)], ids=lambda a: a.name
)
def test_portable_with_the_base_at_hand(algorithm: Algorithm, program: str, flux: nn.Module, tmp_path: Path) -> None:
    adapters = adapted(flux, algorithm, "*transformer_blocks.0.attn.*")
    expected = weights(flux, adapters)
    write(adapters.bundle(), tmp_path / "a.safetensors", "lycoris")
    save_file({k: v.contiguous() for k, v in flux.state_dict().items()}, tmp_path / "base.safetensors")
    base = BaseWeights.open(tmp_path / "base.safetensors")
    to = tmp_path / "b.safetensors"
    done = convert(tmp_path / "a.safetensors", to, portable=program, base=flux, weights=base, allow_growth=True)
    same(loaded(flux, to), expected)
    assert all(each.reads == "as trained" for each in check(to, program, base=flux).layers.values())
    stacks = adapters.bundle().entries.values()
    changed = any(PROGRAMS[program].judge(entry).reads != "as trained" for stack in stacks for entry in stack)
    assert bool(done.written.notes) >= changed


def test_portable_without_the_weights_that_it_needs(flux: nn.Module, tmp_path: Path) -> None:
    write(adapted(flux, GLoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "lycoris")
    with pytest.raises(FileError, match=r"invokeai would need of glora depends on the base model's weights.*--base"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", portable="invokeai", base=flux)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(("to", "portable", "words"), [
    ("comfy", None, "unknown dialect 'comfy'; did you mean 'comfyui'"),
    (None, "comfi", "unknown program 'comfi'; did you mean 'comfyui'"),
    (None, None, "say what to convert to"),
])  # fmt: skip
def test_unknown_words(to: str | None, portable: str | None, words: str, flux: nn.Module, tmp_path: Path) -> None:
    write(adapted(flux, LoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "lycoris")
    with pytest.raises(FileError, match=words):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to, portable=portable, base=flux)


def test_what_a_dialect_cannot_hold(flux: nn.Module, tmp_path: Path) -> None:
    write(adapted(flux, LoHa(rank=2)).bundle(), tmp_path / "a.safetensors", "lycoris")
    with pytest.raises(FileError, match=r"has loha; diffusers files hold only dora, dylora, lora.*--portable"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", base=flux)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", portable="diffusers", base=flux)
    assert detect(tmp_path / "b.safetensors").dialect == "diffusers"


def test_a_folder_of_pefts(flux: nn.Module, tmp_path: Path) -> None:
    adapters = adapted(flux, LoHa(rank=2, alpha=1.0))
    expected = weights(flux, adapters)
    write(adapters.bundle(), tmp_path / "a.safetensors", "lycoris")
    convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft", base=flux)
    same(loaded(flux, tmp_path / "peft"), expected)
    same(loaded(flux, tmp_path / "peft" / "adapter_model.safetensors"), expected)
    assert detect(tmp_path / "peft").dialect == "peft"
    assert check(tmp_path / "peft", "peft", base=flux).as_trained
    convert(tmp_path / "peft", tmp_path / "b.safetensors", "kohya", base=flux, allow_growth=True)
    same(loaded(flux, tmp_path / "b.safetensors"), expected)


def test_metadata_is_kept_and_what_is_stale_is_not(flux: nn.Module, tmp_path: Path) -> None:
    said = {"ss_output_name": "x", "sshs_model_hash": "0", "modelspec.title": "y"}
    write(adapted(flux, LoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "kohya", metadata=said)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", base=flux, allow_growth=True)
    kept = read_header(tmp_path / "b.safetensors").metadata
    assert kept["ss_output_name"] == "x"
    assert kept["modelspec.title"] == "y"
    assert "sshs_model_hash" not in kept
    assert json.loads(kept["lora_adapter_metadata"])["transformer.r"] == 2
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", base=flux, allow_growth=True)
    after = read_header(tmp_path / "c.safetensors").metadata
    assert "lora_adapter_metadata" not in after
    assert after["lycoris_base"] == read_header(tmp_path / "a.safetensors").metadata["lycoris_base"]
    assert after["lycoris_scale"] == '{"*": 1.0}'
    assert read(tmp_path / "c.safetensors", flux).report.remarks == ()


def test_load_tensors_of_a_conversion_are_its_own(flux: nn.Module, tmp_path: Path) -> None:
    """The source may be removed while the result is in use."""
    write(adapted(flux, LoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "lycoris")
    made = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya-diffusers", base=flux)
    (tmp_path / "a.safetensors").unlink()
    held = load_tensors(tmp_path / "b.safetensors")[0]
    assert all(key.startswith("lora_unet_") for key in held)
    assert all(torch.equal(held[key], tensor) for key, tensor in made.written.tensors.items())


def test_a_folder_of_pefts_for_a_model_that_is_recognised(tmp_path: Path) -> None:
    layer = "single_transformer_blocks.3.proj_mlp"
    geometry = load_skeleton("flux.1-dev")[layer]
    tensors = {slot: torch.randn(what.shape) for slot, what in LoRA(rank=2).slots(geometry).items()}
    write_peft(Bundle({layer: (Entry(LoRA(rank=2), geometry, tensors),)}), tmp_path / "folder")
    done = str(convert(tmp_path / "folder", tmp_path / "a.safetensors", "comfyui", allow_growth=True))
    assert "taken to be for denoiser flux.1-schnell or flux.1-dev; unsure" in done
    assert "diffusion_model.single_blocks.3.linear1.lora_up.weight" in load_file(tmp_path / "a.safetensors")


def test_a_text_encoder_alone(flux: nn.Module, tmp_path: Path) -> None:
    key = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{key}.lora_up.weight": torch.ones(768, 2), f"{key}.lora_down.weight": torch.ones(2, 768)}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "flux1"})
    save_file({"x": torch.ones(1)}, tmp_path / "base.safetensors")
    base = BaseWeights.open(tmp_path / "base.safetensors")
    to = tmp_path / "b.safetensors"
    convert(tmp_path / "a.safetensors", to, "comfyui", portable="comfyui", base=flux, weights=base)
    (up,) = (name for name in load_file(tmp_path / "b.safetensors") if name.endswith("lora_up.weight"))
    assert up == "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_up.weight"


def test_a_program_that_does_not_know_the_dialect(flux: nn.Module, tmp_path: Path) -> None:
    write(adapted(flux, LoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "lycoris")
    with pytest.raises(FileError, match=r"SimpleTuner does not know keys of the format kohya .*; it knows lycoris"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", portable="simpletuner", base=flux)


def test_what_has_no_place_is_left_out_only_when_asked(flux: nn.Module, tmp_path: Path) -> None:
    write(adapted(flux, LoRA(rank=2)).bundle(), tmp_path / "a.safetensors", "kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    extra = {
        "lora_unet_nowhere.lora_up.weight": torch.ones(2, 2),
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 2),
    }
    save_file(tensors | extra, tmp_path / "b.safetensors")
    with pytest.raises(FileError, match="nowhere"):
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", base=flux)
    done = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", base=flux, strict=False)
    assert "unused: lora_unet_nowhere.lora_up.weight" in str(done)
    assert load_file(tmp_path / "c.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize(("to", "name"), [("kohya", "lora"), ("diffusers", "dora")])
def test_an_export_depends_on_the_dialect(to: str, name: str, flux: nn.Module, tmp_path: Path) -> None:
    """diffusers leaves DoRA's lengths out of kohya's files, and reads them in its own."""
    write(adapted(flux, DoRA(inner=LoRA(rank=2)), "*transformer_blocks.0.attn.*").bundle(), tmp_path / "a.safetensors")
    save_file({k: v.contiguous() for k, v in flux.state_dict().items()}, tmp_path / "base.safetensors")
    base = BaseWeights.open(tmp_path / "base.safetensors")
    at = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    convert(*at, to, portable="diffusers", base=flux, weights=base, allow_growth=True)
    entries = read(tmp_path / "b.safetensors", flux).entries
    assert {entry.algorithm.name for (entry,) in entries.values()} == {name}
    assert check(tmp_path / "b.safetensors", "diffusers", base=flux).as_trained
