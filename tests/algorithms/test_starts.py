"""How adapters start: the size of what a start may become does not depend on the rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lycoris import AdapterSet, LoHa, LoKr, Rule, plan
from lycoris.algorithms.base import Algorithm

RANKS = [1, 4, 16, 64]
LAYERS = {"linear": lambda: nn.Linear(256, 256), "conv2d": lambda: nn.Conv2d(96, 96, 3)}


def variance(algorithm: Algorithm, layer: str) -> float:
    """Of ΔW, times the inputs of an output: with a gate no factor starts at zero, so all of them are drawn."""
    model = nn.Sequential(LAYERS[layer]())
    ((adapter,),) = AdapterSet.build(model, plan(model, Rule(algorithm), strict=False)).stacks.values()
    g = adapter.geometry
    return float(algorithm.delta(adapter.tensors(), g).weight.detach().square().mean() * g.fan_in)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "make",
    [
        lambda r: LoHa(rank=r, use_scalar=True, stable_init=True),
        lambda r: LoHa(rank=r, use_scalar=True, stable_init=True, tucker=True),
        lambda r: LoKr(rank=r, use_scalar=True, stable_init=True, factor=2),
        lambda r: LoKr(rank=r, use_scalar=True, stable_init=True, factor=2, tucker=True),
        lambda r: LoKr(rank=min(r, 7), use_scalar=True, stable_init=True, factor=16, decompose_both=True),
        lambda r: LoKr(use_scalar=True, stable_init=True, full_matrix=True),
    ],
    ids=["loha", "loha-tucker", "lokr", "lokr-tucker", "lokr-both", "lokr-whole"],
)
def test_a_stable_start_has_the_variance_of_a_layer_at_any_rank(make, layer: str) -> None:
    found = [variance(make(rank), layer) for rank in RANKS for _ in range(8)]
    means = torch.tensor(found).reshape(len(RANKS), -1).mean(1)
    assert ((means > 0.5) & (means < 2)).all(), means


def test_the_usual_start_of_loha_grows_with_the_rank() -> None:
    assert variance(LoHa(rank=64, use_scalar=True), "linear") > 1000 * variance(LoHa(rank=1, use_scalar=True), "linear")
