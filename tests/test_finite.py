"""Naming the module where NaN began."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import adapt
from lycoris import AdapterSet, LoRA, NotFiniteError, Rule, plan, watch_finite
from lycoris.adapters.debug import first_bad_module, first_bad_tensor


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))


def test_the_innermost_first_module_is_named() -> None:
    net = model()
    with torch.no_grad():
        net[1][0].weight.fill_(torch.nan)
    assert first_bad_module(net, lambda: net(torch.ones(1, 2))) == "1.0 (Linear)"
    assert all(not module._forward_hooks for module in net.modules())


def test_a_finite_model_has_none() -> None:
    net = model()
    assert first_bad_module(net, lambda: net(torch.ones(1, 2))) is None
    assert first_bad_tensor(net) is None


def test_a_bad_gradient_is_named() -> None:
    net = model()
    net[2].weight.grad = torch.full((1, 2), torch.inf)
    assert first_bad_tensor(net) == "the gradient of 2.weight"


def test_a_bad_parameter_is_named() -> None:
    net = model()
    with torch.no_grad():
        net[0].bias[1] = torch.inf
    assert first_bad_tensor(net) == "0.bias"


def test_an_adapter_that_went_bad_is_named_while_training() -> None:
    net = model()
    adapters = adapt(net, LoRA(rank=1))
    with watch_finite(net):
        net(torch.ones(1, 2)).sum().backward()
    with torch.no_grad():
        adapters.stacks["1.0"][0].up.fill_(torch.nan)
    told = r"1\.0\.adapter_default \(Adapter\) returned NaN or infinity; what it was given is finite"
    with pytest.raises(NotFiniteError, match=told), watch_finite(net):
        net(torch.ones(1, 2))
    assert all(not module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_low_precision_are_warned_about(dtype: torch.dtype) -> None:
    placed = plan(model(), Rule(LoRA(rank=1)))
    with pytest.warns(UserWarning, match="rounds away.*stochastic_rounding=True"):
        AdapterSet.build(model(), placed, dtype=dtype)
    AdapterSet.build(model(), placed, dtype=dtype, stochastic_rounding=True)
    AdapterSet.build(model(), placed)
