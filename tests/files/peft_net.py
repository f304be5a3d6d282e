"""One layer of each kind that PEFT knows, by name, and adapters of PEFT's and of this library on it."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cases import perturb, relative
from lycoris import AdapterSet, Rule, plan


class Net(nn.Module):
    """One layer of each kind that PEFT knows, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(
            {
                "linear": nn.Linear(12, 18),
                "bare": nn.Linear(18, 12, bias=False),
                "conv1d": nn.Conv1d(6, 8, 3, padding=1),
                "wide1d": nn.Conv1d(16, 24, 3),
                "conv2d": nn.Conv2d(6, 8, 3, padding=1, stride=2),
                "pointwise": nn.Conv2d(8, 12, 1),
                "grouped": nn.Conv2d(8, 12, 3, padding=1, groups=4),
                "conv3d": nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)),
                "embedding": nn.Embedding(9, 8),
                "turned": Conv1D(18, 12),
                "norm": nn.LayerNorm(12),
            }
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: layer(x[name]) for name, layer in self.inner.items()}


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = {
        "linear": (2, 12),
        "bare": (2, 18),
        "conv1d": (2, 6, 9),
        "wide1d": (2, 16, 9),
        "conv2d": (2, 6, 7, 6),
    }
    x |= {
        "pointwise": (2, 8, 4, 4),
        "grouped": (2, 8, 5, 5),
        "conv3d": (1, 4, 2, 4, 5),
        "turned": (2, 5, 12),
        "norm": (2, 12),
    }
    return {name: torch.randn(shape).double() for name, shape in x.items()} | {"embedding": torch.randint(0, 9, (2, 5))}


def at(*names: str) -> list[str]:
    return [f"inner.{name}" for name in names]


ALL_LORA = at("linear", "bare", "conv1d", "conv2d", "pointwise", "conv3d", "embedding", "turned")


def trained(config: peft.PeftConfig, model: nn.Module | None = None) -> peft.PeftModel:
    """As after training: every trainable tensor moved."""
    wrapped = peft.get_peft_model(net() if model is None else model, config).double().eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return wrapped


def outputs(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(inputs())


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(relative(one[name], other[name]) for name in one)


def built(rules: list[Rule], model: nn.Module | None = None) -> AdapterSet:
    """Adapters with an effect on the net."""
    model = net() if model is None else model
    adapters = AdapterSet.build(model, plan(model, rules, strict=False), dtype=torch.float64)
    perturb(adapters)
    return adapters
