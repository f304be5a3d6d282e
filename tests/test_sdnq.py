"""Adapters on the layers of SDNQ, which run without gradients; only where that library is installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cases import ALGORITHMS, perturb, relative
from lycoris import AdapterSet, AttachError, LoRA, Rule, plan
from lycoris.layers import base_weights

pytestmark = pytest.mark.filterwarnings("default")  # importing it warns, by what else is installed
sdnq = pytest.importorskip("sdnq", exc_type=ImportError)

SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"weights_dtype": "int8"},
    "uint4": {"weights_dtype": "uint4"},
    "int5": {"weights_dtype": "int5"},
    "uint4 in groups": {"weights_dtype": "uint4", "group_size": 32},
    "uint4 with a low-rank part": {"weights_dtype": "uint4", "use_svd": True},
    "uint4 rotated": {"weights_dtype": "uint4", "use_hadamard": True},
    "uint4 by codebook": {"weights_dtype": "uint4", "use_codebook": True},
    "float8": {"weights_dtype": "float8_e4m3fn"},
    "float16": {"weights_dtype": "float16"},
}
PRODUCTS = {"int8, quantised activations": {"weights_dtype": "int8", "use_quantized_matmul": True}}
EVERY = pytest.mark.parametrize("settings", [*SETTINGS.values(), *PRODUCTS.values()], ids=[*SETTINGS, *PRODUCTS])


def quantised(model: nn.Sequential, **settings: Any) -> nn.Sequential:
    from sdnq.quantizer import apply_sdnq_to_module

    free = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0, "add_skip_keys": False}
    config = sdnq.SDNQConfig(**free, **settings)
    return apply_sdnq_to_module(copy.deepcopy(model), config)[0].requires_grad_(False)


def dense(model: nn.Sequential, low: nn.Sequential) -> nn.Sequential:
    """The same layers with the decoded weights."""
    made = copy.deepcopy(model).requires_grad_(False)
    for own, other in zip(made, low, strict=True):
        if hasattr(own, "weight"):
            own.weight.copy_(base_weights.read(other).weight)
    return made


@EVERY
def test_a_weight_is_read_as_the_layer_uses_it(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 96))
    low, x = quantised(model, **settings), torch.randn(3, 64)
    assert type(low[0]).__name__ == "SDNQLinear"
    assert base_weights.kind(low[0]).startswith(f"SDNQ {settings['weights_dtype']}")
    found = base_weights.read(low[0])
    assert found.weight.shape == (96, 64)
    assert relative(nn.functional.linear(x, *found), low(x)) < 1e-5
    assert relative(found.weight, model[0].weight.detach()) < 0.3


@EVERY
@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "tlora", "dora-lora", "glora", "ia3", "oft", "boft", "full"])
def test_adapters_train_as_on_the_decoded_weights(settings: dict[str, Any], name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    low, x = quantised(model, **settings), torch.randn(40, 64)
    wide = dense(model, low)
    sets = []
    for each in (low, wide):
        torch.manual_seed(0)
        adapters = AdapterSet.build(each, plan(each, Rule(ALGORITHMS[name]), strict=False)).attach()
        perturb(adapters, 0.05)
        sets.append(adapters)
    sets[1].load_state_dict(sets[0].state_dict())
    exact = not settings.get("use_quantized_matmul")
    assert relative(low(x), wide(x)) < (1e-4 if exact else 0.05)
    for each in (low, wide):
        each(x).square().mean().backward()
    for one, two in zip(sets[0].parameters(), sets[1].parameters(), strict=True):
        assert relative(one.grad, two.grad) < (1e-4 if exact else 0.3)
    optimizer = torch.optim.Adam(list(sets[0].parameters()), lr=1e-2)
    aim, losses = torch.randn(40, 64), []
    for _ in range(8):
        loss = (low(x) - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_convolution_of_it() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 8, 3))
    low, x = quantised(model, weights_dtype="int8", quant_conv=True), torch.randn(2, 32, 6, 6)
    wide = dense(model, low)
    grads = []
    for each in (low, wide):
        torch.manual_seed(0)
        adapters = AdapterSet.build(each, plan(each, Rule(LoRA(rank=2)))).attach()
        perturb(adapters, 0.1)
        each(x).square().sum().backward()
        grads.append([parameter.grad for parameter in adapters.parameters()])
    assert all(relative(one, two) < 1e-4 for one, two in zip(*grads, strict=True))


def test_what_the_table_says_of_it() -> None:
    low = quantised(nn.Sequential(nn.Linear(64, 96)), weights_dtype="uint4")
    adapters = AdapterSet.build(low, plan(low, Rule(LoRA(rank=2)))).attach()
    (row,) = adapters.capabilities().rows
    assert (row.stored_as, row.trains, row.reads, row.merges) == ("SDNQ uint4", True, True, False)
    assert "backward decodes the weight" in row.remark
    with pytest.raises(AttachError, match="cannot be merged into: SDNQ would choose"):
        adapters.merge(into_low_bit=True)
    adapters.detach()
    assert type(low[0]).__name__ == "SDNQLinear"
