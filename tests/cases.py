"""Every algorithm with its options, and every kind of layer: what the contracts run over.

A new algorithm has to have configurations here: `contracts/test_equality.py` fails until it does.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lycoris import (
    BOFT,
    IA3,
    OFT,
    AdapterSet,
    DoRA,
    DyLoRA,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Norm,
    Replace,
    Rule,
    TLoRA,
    plan,
)
from lycoris.adapters.attach import base_class, top
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.slices import AdditiveSlice, Slice
from lycoris.errors import ConfigError
from lycoris.layers.geometry import sites

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
    "dora-loha-high-rank": DoRA(over=LoHa(rank=5, alpha=1.0)),
    "dora-gate-in": DoRA(over=LoRA(rank=2, gate=True), axis="in"),
    "dora-full": DoRA(over=Full(bias=False)),
    "dylora-rs": DyLoRA(rank=4, block_size=2, rs_lora=True),
    "dora-dylora": DoRA(over=DyLoRA(rank=4, block_size=2)),
    "dylora": DyLoRA(rank=4, alpha=2.0, block_size=2),
    "glora": GLoRA(rank=2, alpha=1.0),
    "glora-gate": GLoRA(rank=2, gate=True),
    "glora-rs": GLoRA(rank=4, alpha=2.0, rs_lora=True),
    "ia3": IA3(),
    "ia3-in": IA3(on_input=True),
    "oft": OFT(block_size=2),
    "oft-rescale": OFT(block_size=2, rescale=True),
    "oft-constraint": OFT(block_size=2, constraint=0.02),
    "boft": BOFT(block_size=2),
    "boft-rescale": BOFT(block_size=2, rescale=True, constraint=0.05),
    "full-bias": Full(weight=False),
    "norm": Norm(),
    "replace": Replace(),
    "replace-bias": Replace(weight=False),
    "lora-drops": LoRA(rank=4, dropout=0.3, rank_dropout=0.4, module_dropout=0.2),
    "loha-drops": LoHa(rank=2, rank_dropout=0.5, rank_dropout_scale=True, dropout=0.2),
    "lokr-drops": LoKr(rank=1, alpha=0.5, rank_dropout=0.5, dropout=0.2),
    "full-drops": Full(dropout=0.2, module_dropout=0.3),
    "tlora-drops": TLoRA(rank=3, rank_dropout=0.3),
    "oft-drops": OFT(block_size=2, module_dropout=0.5),
    "dora-drops": DoRA(over=LoRA(rank=3, dropout=0.3, rank_dropout=0.3)),
    "loha-stable": LoHa(rank=3, stable_init=True),
    "lokr-stable": LoKr(rank=1, stable_init=True, decompose_both=True),
}
"""Ranks above what the smallest layers hold are meant: such adapters are wasteful, and exact."""

SLICES: dict[str, Algorithm] = {
    "slice-lora": AdditiveSlice(over=LoRA(rank=3, alpha=2.0), start=2, others=5),
    "slice-lokr": AdditiveSlice(over=LoKr(rank=1, alpha=0.5, dropout=0.2), start=3, others=6),
    "slice-lokr-rolled": AdditiveSlice(over=LoKr(full_matrix=True, factor=4), start=3),
    "slice-tlora": AdditiveSlice(over=TLoRA(rank=2), start=4, others=4),
    "slice-full": AdditiveSlice(over=Full(), start=1, others=3),
    "slice-dora-lokr": Slice(over=DoRA(over=LoKr(full_matrix=True, factor=4)), start=3, others=6),
    "slice-oft": Slice(over=OFT(block_size=2, constraint=0.02, rescale=True), start=2, others=4),
    "slice-boft-rolled": Slice(over=BOFT(block_size=2), start=3),
}
"""Rows of an algorithm on a fused layer: in no file by themselves, and on a layer like any algorithm."""
WITH_SLICES = ALGORITHMS | SLICES

NOT_ALONE = (SLICES["slice-boft-rolled"],)
"""Slices that no file can hold by themselves: their rows are an adapter only together with the others."""


class HalfNorm(nn.Module):
    """As model libraries write theirs: no class of torch, no bias, a formula of its own."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * (0.5 + self.weight)


class Fused(nn.Module):
    """A bare matrix that its module uses by itself."""

    def __init__(self, o: int, i: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.randn(o, i) / i**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.weight_in.T


class Experts(nn.Module):
    """A stack of matrices, one for each entry of the batch."""

    def __init__(self, e: int, o: int, i: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(e, o, i) / i**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eti,eoi->eto", x, self.experts)


@dataclass(frozen=True)
class LayerCase:
    make: type[nn.Module]
    args: tuple[object, ...]
    options: dict[str, object]
    x: tuple[int, ...]

    def layer(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return self.make(*self.args, **self.options).to(dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        if self.make is nn.Embedding:
            return torch.randint(0, 9, self.x)
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
    "conv1d-transformers": LayerCase(Conv1D, (18, 12), {}, (2, 5, 12)),
    "embedding": LayerCase(nn.Embedding, (9, 8), {}, (2, 5)),
    "layer-norm": LayerCase(nn.LayerNorm, (8,), {}, (2, 5, 8)),
    "layer-norm-2d": LayerCase(nn.LayerNorm, ((3, 4),), {"bias": False}, (2, 3, 4)),
    "group-norm": LayerCase(nn.GroupNorm, (2, 6), {}, (2, 6, 3, 4)),
    "rms-norm": LayerCase(nn.RMSNorm, (8,), {"eps": 1e-4}, (2, 8)),
    "own-norm": LayerCase(HalfNorm, (8,), {}, (2, 5, 8)),
    "parameter": LayerCase(Fused, (8, 12), {}, (2, 5, 12)),
    "experts": LayerCase(Experts, (3, 8, 6), {}, (3, 5, 6)),
}


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def serves(model: nn.Module, algorithm: Algorithm) -> bool:
    """Whether an algorithm serves the one layer of a model: `test_planning.py` says for which it must not."""
    ((_, _, _, geometry),) = sites(model)
    try:
        algorithm.check(geometry)
    except ConfigError:
        return False
    return True


PAIRS_WITH_SLICES = [
    (name, layer)
    for layer, case in LAYERS.items()
    for name, algorithm in WITH_SLICES.items()
    if serves(One(case.layer()), algorithm)
]
PAIRS = [(name, layer) for name, layer in PAIRS_WITH_SLICES if name in ALGORITHMS]
"""Every algorithm on every layer that it serves."""


def adapt(model: nn.Module, *algorithms: Algorithm, name: str = "default", random: bool = True) -> AdapterSet:
    """Attach algorithms to every layer, in the layers' dtype, with tensors that have an effect."""
    dtype = next(model.parameters()).dtype
    rule = Rule(algorithms, kind="*")
    adapters = AdapterSet.build(model, plan(model, rule, strict=False), name=name, dtype=dtype).attach()
    if random:
        perturb(adapters)
    return adapters


@torch.no_grad()
def perturb(adapters: AdapterSet, size: float = 0.3) -> None:
    for parameter in adapters.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def dense(model: One, x: Tensor) -> Tensor:
    """What a model of one layer gives with the weight that its adapters make, by the layer's own operation."""
    ((_, layer, attribute, _),) = sites(model)
    affine = top(layer, attribute).affine()
    if not attribute:
        return top(layer).run(x, affine)
    plain = copy.deepcopy(layer)
    plain.__class__ = base_class(plain)
    return torch.func.functional_call(plain, {attribute: affine.weight}, (x,))


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
