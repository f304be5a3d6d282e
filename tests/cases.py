"""Every algorithm with its options, and every kind of layer: what the contracts run over.

A new algorithm adds its configurations here by being in the registry: `test_cases.py` fails until it has some.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lycoris import AdapterSet, DoRA, Full, LoHa, LoKr, LoRA, Rule, TLoRA, plan
from lycoris.algorithm import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "lora": LoRA(rank=3, alpha=2.0),
    "lora-rs": LoRA(rank=4, alpha=2.0, rs_lora=True),
    "lora-gate": LoRA(rank=2, gate=True),
    "lora-tucker": LoRA(rank=3, alpha=1.5, tucker=True),
    "loha": LoHa(rank=2, alpha=1.0),
    "loha-high-rank": LoHa(rank=5, alpha=3.0),
    "loha-gate": LoHa(rank=2, gate=True),
    "loha-tucker": LoHa(rank=3, alpha=2.0, tucker=True),
    "lokr": LoKr(rank=1, alpha=0.5),
    "lokr-factor": LoKr(rank=2, alpha=1.0, factor=2),
    "lokr-whole": LoKr(rank=10000, alpha=1.0),
    "lokr-full-matrix": LoKr(full_matrix=True, factor=4),
    "lokr-both": LoKr(rank=1, alpha=2.0, decompose_both=True),
    "lokr-unbalanced": LoKr(rank=1, alpha=2.0, unbalanced=True),
    "lokr-gate": LoKr(rank=1, gate=True),
    "lokr-tucker": LoKr(rank=1, alpha=2.0, tucker=True, factor=2),
    "tlora": TLoRA(rank=3, alpha=2.0),
    "tlora-last": TLoRA(rank=2, vectors="last"),
    "tlora-middle": TLoRA(rank=2, vectors="middle"),
    "tlora-random": TLoRA(rank=2, data_init=False),
    "tlora-wide": TLoRA(rank=40),
    "full": Full(),
    "full-weight": Full(bias=False),
    "dora-lora": DoRA(over=LoRA(rank=3, alpha=2.0)),
    "dora-lora-in": DoRA(over=LoRA(rank=3, alpha=2.0), axis="in"),
    "dora-loha": DoRA(over=LoHa(rank=2, alpha=1.0)),
    "dora-lokr": DoRA(over=LoKr(rank=1, alpha=0.5)),
    "dora-lokr-in": DoRA(over=LoKr(full_matrix=True), axis="in"),
}


@dataclass(frozen=True)
class LayerCase:
    make: type[nn.Module]
    args: tuple[object, ...]
    options: dict[str, object]
    x: tuple[int, ...]

    def layer(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return self.make(*self.args, **self.options).to(dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(self.x, dtype=dtype)


LAYERS: dict[str, LayerCase] = {
    "linear": LayerCase(nn.Linear, (12, 18), {}, (2, 5, 12)),
    "linear-no-bias": LayerCase(nn.Linear, (18, 12), {"bias": False}, (4, 18)),
    "linear-prime": LayerCase(nn.Linear, (7, 13), {}, (2, 2, 3, 7)),
    "linear-one-vector": LayerCase(nn.Linear, (8, 8), {}, (8,)),
    "conv1d": LayerCase(nn.Conv1d, (6, 8, 3), {"padding": 1}, (2, 6, 9)),
    "conv2d": LayerCase(nn.Conv2d, (6, 8, 3), {"padding": 1}, (2, 6, 5, 6)),
    "conv2d-stride": LayerCase(nn.Conv2d, (8, 6, 3), {"stride": 2, "dilation": 2, "padding": 2}, (2, 8, 9, 8)),
    "conv2d-rectangle": LayerCase(nn.Conv2d, (4, 8, (1, 3)), {"padding": (0, 1), "bias": False}, (2, 4, 5, 6)),
    "conv2d-1x1": LayerCase(nn.Conv2d, (8, 12, 1), {}, (2, 8, 4, 4)),
    "conv2d-same": LayerCase(nn.Conv2d, (4, 8, 3), {"padding": "same", "dilation": 2}, (2, 4, 6, 6)),
    "conv2d-circular": LayerCase(nn.Conv2d, (4, 8, 3), {"padding": 1, "padding_mode": "circular"}, (2, 4, 5, 5)),
    "conv2d-reflect": LayerCase(nn.Conv2d, (4, 8, 3), {"padding": (1, 0), "padding_mode": "reflect"}, (2, 4, 5, 5)),
    "conv2d-groups": LayerCase(nn.Conv2d, (8, 12, 3), {"padding": 1, "groups": 4}, (2, 8, 4, 4)),
    "conv2d-depthwise": LayerCase(nn.Conv2d, (6, 6, 3), {"padding": 1, "groups": 6}, (2, 6, 4, 4)),
    "conv2d-unbatched": LayerCase(nn.Conv2d, (4, 8, 3), {"padding": 1}, (4, 5, 5)),
    "conv3d": LayerCase(nn.Conv3d, (4, 6, (1, 3, 3)), {"padding": (0, 1, 1)}, (1, 4, 2, 4, 5)),
}


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapt(model: nn.Module, *algorithms: Algorithm, name: str = "default", random: bool = True) -> AdapterSet:
    """Attach algorithms to every layer, in the layers' dtype, with tensors that have an effect."""
    dtype = next(model.parameters()).dtype
    adapters = AdapterSet.build(model, plan(model, Rule(algorithms)), name=name, dtype=dtype).attach()
    if random:
        perturb(adapters)
    return adapters


@torch.no_grad()
def perturb(adapters: AdapterSet, size: float = 0.3) -> None:
    for parameter in adapters.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
