"""The state that is told of an optimizer is what it has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lycoris import AdapterSet, ConfigError, LoKr, LoRA, Norm, Rule, TLoRA, explain, plan
from lycoris.analysis.memory import memory

MAKERS = {
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64), nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 8, 3)
    )


@pytest.mark.parametrize("name", MAKERS)
def test_optimizer_state_is_what_the_optimizer_has(name: str) -> None:
    base = model()
    planned = plan(base, [Rule(Norm(), kind="norm"), Rule(LoKr(rank=2), path="0"), Rule(LoRA(rank=4))])
    adapters = AdapterSet.build(base, planned).attach()
    optimizer = MAKERS[name](list(adapters.parameters()))
    base(torch.randn(2, 64)).square().mean().backward()
    optimizer.step()
    held = [t for state in optimizer.state.values() for key, t in state.items() if torch.is_tensor(t) and key != "step"]
    told = memory(explain(planned), 0, optimizer=name)
    assert told.optimizer == sum(t.numel() * t.element_size() for t in held)
    assert told.gradients == sum(p.numel() * p.element_size() for p in adapters.parameters())


def test_parts_and_sum() -> None:
    base = model()
    planned = plan(base, Rule(TLoRA(rank=2), kind="linear"))
    told = memory(explain(planned, tokens=10, dtype=torch.bfloat16), 1000, batch=3)
    assert told.base == 2000
    assert told.adapters == 2 * told.gradients
    assert told.kept == 3 * 10 * 2 * 2 * 4
    assert told.inputs == 3 * 10 * 2 * (64 + 128)
    assert told.total == sum(value for name, value in told.as_dict().items() if name != "total")
    assert memory(explain(planned), 1000, optimizer="adamw8bit").optimizer < told.optimizer * 2
    assert "optimizer state" in str(told)


def test_wrong_settings_are_refused() -> None:
    explained = explain(plan(model(), Rule(LoRA(rank=2), kind="linear")))
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        memory(explained, 0, optimizer="adamww")
    with pytest.raises(ConfigError, match="batch"):
        memory(explained, 0, batch=0)
