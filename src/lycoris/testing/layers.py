"""Every kind of layer that adapters go on, small, with an input for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn


class HalfNorm(nn.Module):
    """A norm as model libraries write their own: no torch class, no bias, its own formula."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * (0.5 + self.weight)


class BareMatrix(nn.Module):
    """A matrix that is a bare parameter, which its module uses by itself."""

    def __init__(self, o: int, i: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.randn(o, i) / i**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.weight_in.T


class Experts(nn.Module):
    """A stack of matrices in one parameter, one for each entry of the batch."""

    def __init__(self, e: int, o: int, i: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(e, o, i) / i**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eti,eoi->eto", x, self.experts)


@dataclass(frozen=True)
class LayerCase:
    """How to build a layer, and the shape of an input for it."""

    make: Callable[..., nn.Module]
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    x: tuple[int, ...]

    def layer(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Build the layer, with torch's random numbers."""
        return self.make(*self.args, **self.options).to(dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draw an input."""
        if self.make is nn.Embedding:
            return torch.randint(0, self.args[0], self.x)
        return torch.randn(self.x, dtype=dtype)


LAYERS: Mapping[str, LayerCase] = MappingProxyType(
    {
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
        "embedding": LayerCase(nn.Embedding, (9, 8), {}, (2, 5)),
        "layer-norm": LayerCase(nn.LayerNorm, (8,), {}, (2, 5, 8)),
        "layer-norm-2d": LayerCase(nn.LayerNorm, ((3, 4),), {"bias": False}, (2, 3, 4)),
        "group-norm": LayerCase(nn.GroupNorm, (2, 6), {}, (2, 6, 3, 4)),
        "rms-norm": LayerCase(nn.RMSNorm, (8,), {"eps": 1e-4}, (2, 8)),
        "own-norm": LayerCase(HalfNorm, (8,), {}, (2, 5, 8)),
        "parameter": LayerCase(BareMatrix, (8, 12), {}, (2, 5, 12)),
        "experts": LayerCase(Experts, (3, 8, 6), {}, (3, 5, 6)),
    }
)
"""By name; the first word is the kind of layer."""


class OneLayer(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
