"""Strength by block: factors on paths, the longest that holds a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import adapt, relative
from lycoris import LoRA
from lycoris.errors import ConfigError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(*(nn.Linear(6, 6) for _ in range(11))), nn.Linear(6, 6)).double()


def scaled(strengths: dict[str, float], x: torch.Tensor) -> torch.Tensor:
    """The same net with each layer's change merged by hand."""
    model = net()
    torch.manual_seed(1)
    adapters = adapt(model, LoRA(rank=2))
    changed = {path: stack[0].adapt_affine(site_affine(model, path)) for path, stack in adapters.stacks.items()}
    adapters.detach()
    with torch.no_grad():
        for path, affine in changed.items():
            layer = model.get_submodule(path)
            layer.weight.lerp_(affine.weight, strengths.get(path, strengths[""]))
    return model(x)


def site_affine(model: nn.Module, path: str):
    from lycoris.adapters.attach import bottom
    from lycoris.layers.sites import Site

    return bottom(Site.of(model.get_submodule(path))).affine()


@pytest.mark.parametrize("merged", [False, True])
def test_the_longest_block_counts(merged: bool) -> None:
    model, x = net(), torch.randn(3, 6).double()
    torch.manual_seed(1)
    adapters = adapt(model, LoRA(rank=2))
    adapters.set_strength(0.5, {"0": 2.0, "0.1": 0.0, "1": 1.2})
    if merged:
        adapters.merge()
    strengths = {f"0.{at}": 1.0 for at in range(11)} | {"0.1": 0.0, "1": 0.6, "": 0.5}
    assert relative(model(x), scaled(strengths, x)) < 1e-12
    if merged:
        adapters.unmerge()
        assert relative(model(x), scaled(strengths, x)) < 1e-12
    with adapters.at(strength=1.0):
        double = {path: 2 * strength for path, strength in strengths.items()}
        assert relative(model(x), scaled(double, x)) < 1e-12
    adapters.set_strength(0.5)
    assert relative(model(x), scaled({"": 0.5}, x)) < 1e-12


def test_a_block_without_adapters_is_named() -> None:
    adapters = adapt(net(), LoRA(rank=2))
    with pytest.raises(ConfigError, match=r"unknown block of layers with adapters '0\.12'; did you mean"):
        adapters.set_strength(1.0, {"0.12": 0.5})
    with pytest.raises(ConfigError, match="finite"):
        adapters.set_strength(1.0, {"0.1": float("nan")})
    assert adapters.strength == 1.0
