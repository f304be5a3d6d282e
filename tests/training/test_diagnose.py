"""Naming the module where NaN began."""

from __future__ import annotations

import torch
from torch import nn

from lycoris.training.diagnose import first_bad_gradient, first_bad_module


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
    assert first_bad_gradient(net) is None


def test_a_bad_gradient_is_named() -> None:
    net = model()
    net[2].weight.grad = torch.full((1, 2), torch.inf)
    assert first_bad_gradient(net) == "the gradient of 2.weight"
