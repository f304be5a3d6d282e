"""Numbers of lycoris-lora 4.1.3's forward pass, reproduced from its own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from cases import One, relative
from lycoris import AdapterSet, Bundle
from lycoris.adapters.attach import top
from lycoris.algorithms.base import Entry
from lycoris.algorithms.tensors import read_tensors
from lycoris.layers.geometry import describe
from lycoris.layers.sites import Site

HERE = Path(__file__).parent.parent / "golden"
CASES = json.loads((HERE / "manifest.json").read_text())


def tensors_of(name: str) -> dict[str, Tensor]:
    with safe_open(HERE / "cases.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(name + "/")]  # noqa: SIM118 -- the file is no mapping
        return {key.removeprefix(name + "/"): file.get_tensor(key) for key in keys}


def layer_of(case: dict, tensors: dict[str, Tensor]) -> nn.Module:
    weight, bias = tensors["base.weight"], tensors.get("base.bias")
    o, i, *kernel = weight.shape
    if not kernel:
        layer: nn.Module = nn.Linear(i, o, bias=bias is not None)
    else:
        make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
        conv = {k: tuple(v) if isinstance(v, list) else v for k, v in case["conv"].items()}
        layer = make(i * conv["groups"], o, tuple(kernel), bias=bias is not None, **conv)
    layer.to(weight.dtype).load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def adapters_of(model: One, tensors: dict[str, Tensor]) -> AdapterSet:
    geometry = describe(model.layer)
    stored = {key.removeprefix("adapter."): value for key, value in tensors.items() if key.startswith("adapter.")}
    algorithm, values = read_tensors(stored, geometry, "layer")
    adapters = AdapterSet.load(model, Bundle({"layer": (Entry(algorithm, geometry, values),)}))
    for (adapter,) in adapters.stacks.values():
        adapter.to(tensors["base.weight"].dtype)
        values = {name: value.to(tensors["x"].dtype) for name, value in values.items()}
        adapter.fill(algorithm.fill_missing(values, top(Site.of(model.layer))))
    return adapters.attach()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_forward_and_merge_reproduce_the_numbers(case: dict) -> None:
    tensors = tensors_of(case["name"])
    model = One(layer_of(case, tensors))
    adapters = adapters_of(model, tensors)
    # T-LoRA's cases are float32. So are DoRA's lengths in every file of 4.1.3, which computes in their precision.
    exact = all(tensor.dtype == torch.float64 for key, tensor in tensors.items() if not key.endswith("alpha"))
    tolerance = 1e-9 if exact else 1e-5
    outputs = {key: value for key, value in tensors.items() if key.startswith("y@")}
    assert outputs
    for key, expected in outputs.items():
        if key == "y@mask2":
            adapters.set_rank_mask(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
            adapters.set_strength(1.0)
        else:
            adapters.set_rank_mask(None)
            adapters.set_strength(float(key.removeprefix("y@")))
        assert relative(model(tensors["x"]), expected) < tolerance, key
        merged = top(Site.of(model.layer)).affine()
        assert relative(describe(model.layer).op(tensors["x"], *merged), expected) < tolerance, key


def test_the_numbers_are_those_of_a_layer_that_was_changed() -> None:
    tensors = tensors_of(CASES[0]["name"])
    plain = F.linear(tensors["x"], tensors["base.weight"], tensors["base.bias"])
    assert relative(tensors["y@1.0"], plain) > 0.01
