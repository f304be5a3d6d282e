"""Which base model a file says that it was made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lycoris import AdapterSet, LoRA, Rule, plan, read, write
from lycoris.models import fingerprint


def base(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(40)), nn.Conv2d(4, 4, 3), nn.LayerNorm(4)).to(dtype)


def made_for(model: nn.Module, path: Path) -> Path:
    write(AdapterSet.build(model, plan(model, Rule(LoRA(rank=2), path="0"))).bundle(), path)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_copies_in_other_precisions_are_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    path = made_for(base(0), tmp_path / "a.safetensors")
    for model in (base(0), base(0, dtype), base(0).to(memory_format=torch.channels_last)):
        assert read(path, model).remarks == ()


def test_other_weights_are_remarked_upon(tmp_path: Path) -> None:
    path = made_for(base(0), tmp_path / "a.safetensors")
    (remark,) = read(path, base(1)).remarks
    assert "for a Sequential with other weights" in remark
    share = fingerprint.compare_signs(fingerprint.sample_signs(base(0)), fingerprint.sample_signs(base(1)))
    assert share is not None
    assert 0.3 < share < 0.7
    trained = base(0)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    share = fingerprint.compare_signs(fingerprint.sample_signs(base(0)), fingerprint.sample_signs(trained))
    assert share is not None
    assert 0.8 < share < fingerprint.SAME_WEIGHTS_SHARE


def test_the_weights_are_those_that_the_adapters_were_made_for(tmp_path: Path) -> None:
    model = base(0)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2), path="*")))
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter)
    adapters.attach().merge()
    told = adapters.bundle().base
    assert told is not None
    assert told.signs == fingerprint.sample_signs(base(0)) != fingerprint.sample_signs(model)


def test_what_is_not_there_is_not_looked_at(tmp_path: Path) -> None:
    assert fingerprint.sample_signs(base(0).to("meta")) == ""
    assert read(made_for(base(0), tmp_path / "a.safetensors"), base(1).to("meta")).remarks == ()


@pytest.mark.parametrize("signs", ["", "?", "AAAA", "é", 7, None, ["AA=="]])
def test_headers_of_strangers(signs: object, tmp_path: Path) -> None:
    model = base(0)
    path = made_for(model, tmp_path / "a.safetensors")
    bundle = read(path, model)
    said = json.dumps(json.loads(bundle.metadata[fingerprint.FINGERPRINT_KEY]) | {"signs": signs})
    write(bundle, tmp_path / "b.safetensors", metadata={fingerprint.FINGERPRINT_KEY: said})
    assert read(tmp_path / "b.safetensors", base(1)).remarks == ()


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_come_back(signs: list[bool]) -> None:
    bits = fingerprint._decode_signs(fingerprint._encode_signs(torch.tensor(signs)))
    assert bits.flatten().tolist()[: len(signs)] == [int(each) for each in signs]
