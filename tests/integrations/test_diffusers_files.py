"""Adapter files on real pipelines: what goes where, and what diffusers' own loader makes of the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_pipelines import DENOISER, adapters, bundles, diffusers_file, draw, kohya, mixed, pipeline, state

from cases import relative
from lycoris import DoRA, LoKr, LoRA, write
from lycoris.errors import ConfigError, FileError
from lycoris.files.peft import encode_lora_metadata, write_peft
from lycoris.integrations.diffusers import load, models

pytestmark = pytest.mark.filterwarnings(
    "ignore:::diffusers", "ignore:::transformers", "ignore:::peft", "ignore:::torch"
)


def test_a_file_says_what_was_applied_unused_and_missing(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("flux", made)
    found = bundles(pipe)
    path = kohya(tmp_path / "whole.safetensors", found)
    loaded = load(pipe, path)
    assert list(loaded.report.applied) == ["transformer", "text_encoder", "text_encoder_2"]
    act = draw(pipe)
    loaded.unload()
    with load(pipe, found):
        assert torch.equal(draw(pipe), act)

    small = pipeline("sd", made)
    own = {"unet": adapters(small.unet, LoRA(rank=2)), "text_encoder_2": found["text_encoder_2"]}
    report = load(small, kohya(tmp_path / "other.safetensors", own)).report
    assert list(report.applied) == ["unet"]
    assert report.unused == ("text_encoder_2",)
    assert report.missing == ("text_encoder",)
    assert "unet: 48 layers of lora\ntext_encoder_2: not in this pipeline, left out\n" in str(report)


def test_experts(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("wan", made)
    found = adapters(pipe.transformer, LoRA(rank=2))
    path = kohya(tmp_path / "one.safetensors", {"transformer": found})
    assert list(load(pipe, path).sets) == ["transformer"]
    assert list(load(pipe, path, to="transformer_2").sets) == ["transformer_2"]
    both = load(pipe, path, to=("transformer", "transformer_2"))
    assert list(both.sets) == ["transformer", "transformer_2"]
    with pytest.raises(ConfigError, match=r"unknown component of the pipeline 'transformer_3'; did you mean"):
        load(pipe, path, to="transformer_3")


def test_what_a_file_has_for_an_expert_is_not_dropped_for_what_it_has_for_the_other(
    made: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipeline("wan", made)
    before = state(pipe)
    own = {name: adapters(models(pipe)[name], LoRA(rank=2), at) for at, name in enumerate(models(pipe))}
    path = tmp_path / "both.safetensors"
    theirs = {"transformer": ""}
    parts = {theirs.get(name, name): models(pipe)[name] for name in own}
    write({theirs.get(name, name): each for name, each in own.items()}, path, "diffusers", model=parts)
    for to in ("transformer_2", ("transformer", "transformer_2")):
        with pytest.raises(ConfigError, match=r"has adapters for the denoiser and text_encoder and transformer_2; to="):
            load(pipe, path, to=to)
    encoder = kohya(tmp_path / "encoder.safetensors", {"text_encoder": own["text_encoder"]})
    with pytest.raises(ConfigError, match="has adapters for text_encoder; to='transformer_2' is for files with"):
        load(pipe, encoder, to="transformer_2")
    assert state(pipe) == before
    assert list(load(pipe, path).sets) == list(own)


def test_a_folder_of_pefts_loads(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("sd", made)
    found = adapters(pipe.unet, LoRA(rank=2))
    write_peft(found, tmp_path / "a")
    with load(pipe, tmp_path / "a"):
        act = draw(pipe)
    with load(pipe, found):
        assert torch.equal(draw(pipe), act)


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", ["mixed", "dora"])
def test_diffusers_own_loader_agrees(family: str, kind: str, made: dict[str, Any], tmp_path: Path) -> None:
    """What `pipe.load_lora_weights` makes of the tensors and the metadata of a bundle gives our outputs."""
    pipe, denoiser = pipeline(family, made), DENOISER[family]
    found = {
        denoiser: mixed(pipe, denoiser) if kind == "mixed" else adapters(models(pipe)[denoiser], DoRA(inner=LoRA()))
    }
    if family != "wan":
        found["text_encoder"] = adapters(pipe.text_encoder, LoRA(rank=3, alpha=2.0))
    diffusers_file(tmp_path, found)
    plain = draw(pipe)
    with load(pipe, found):
        wanted = draw(pipe)
    assert relative(wanted, plain) > 1e-3
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert relative(draw(pipe), wanted) < 1e-4


def test_diffusers_own_adapters_go_over_these(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("sd", made)
    plain = draw(pipe)
    own, theirs = adapters(pipe.unet, LoKr(rank=2), 1), adapters(pipe.unet, LoRA(rank=2), 2)
    diffusers_file(tmp_path, {"unet": theirs})
    with load(pipe, own):
        alone = draw(pipe)
        with load(pipe, theirs):
            both = draw(pipe)
    loaded = load(pipe, own)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert relative(draw(pipe), both) < 1e-4
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), alone)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    loaded.unload()
    with pytest.raises(FileError, match=r"^unet: 48 of 48 layers are no layers of this UNet.*unload_lora_weights"):
        load(pipe, own)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


def test_the_second_expert_takes_its_own(made: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline("wan", made)
    found = {
        name: adapters(models(pipe)[name], LoRA(rank=2), at) for at, name in enumerate(("transformer", "transformer_2"))
    }
    with load(pipe, found):
        wanted = draw(pipe)
    for component, bundle in found.items():
        folder = tmp_path / component
        diffusers_file(folder, {"transformer": bundle})
        pipe.load_lora_weights(
            folder,
            weight_name="pytorch_lora_weights.safetensors",
            adapter_name=component,
            load_into_transformer_2=component == "transformer_2",
        )
    assert relative(draw(pipe), wanted) < 1e-4
    assert json.loads(encode_lora_metadata(found))["transformer_2.r"] == 2
