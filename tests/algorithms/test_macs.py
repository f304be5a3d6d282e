"""The multiplications that a cost states are those that torch counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cases import LAYERS
from lycoris import AdapterSet, LoHa, LoRA, Rule, TLoRA, plan
from lycoris.adapters.adapter import Adapter
from lycoris.algorithms.additive import Additive
from lycoris.layers.sites import ModelSites

ALGORITHMS = [LoRA(rank=3), LoHa(rank=2), TLoRA(rank=3)]
TOKENS = 5


def count_macs(run: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_of_building_the_change(algorithm: Additive, layer: str) -> None:
    (site,) = ModelSites(nn.Sequential(LAYERS[layer].layer())).values()
    adapter = Adapter(algorithm, site.geometry)
    assert count_macs(lambda: algorithm.delta(adapter.whole(), site.geometry)) == algorithm.delta_macs(site.geometry)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_of_the_factored_product(algorithm: Additive) -> None:
    model, x = nn.Sequential(nn.Linear(96, 64)), torch.randn(TOKENS, 96)
    alone = count_macs(lambda: model(x))
    adapters = AdapterSet.build(model, plan(model, Rule(algorithm)))
    adapters.attach()
    (site,) = ModelSites(model).values()
    assert count_macs(lambda: model(x)) - alone == TOKENS * algorithm.product_macs(site.geometry)
