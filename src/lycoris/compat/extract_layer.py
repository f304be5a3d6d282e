"""One layer's change as a LoRA of its largest singular values."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lycoris.errors import ConfigError, unknown

Mode = Literal["fixed", "threshold", "ratio", "quantile", "percentile", "full"]

LowRankResult = tuple[tuple[Tensor, Tensor, Tensor], Literal["low rank"]]
FullResult = tuple[Tensor, Literal["full"]]


def select_rank(mode: Mode, much: float, s: Tensor) -> int:
    """Return how many of the singular values `s`, sorted from the largest, are kept: at least one, at most all.

    For the modes see `lycoris.utils.extract_diff`. Raises `ConfigError` for an unknown mode.
    """
    if mode not in get_args(Mode):
        raise ConfigError(unknown("mode", mode, get_args(Mode)))
    if mode == "fixed":
        count = int(much)
    elif mode == "threshold":
        count = int((s > much).sum())
    elif mode == "ratio":
        count = int((s > much * s.max()).sum())
    else:
        count = int((s.cumsum(0) < much * s.sum()).sum()) + 1
    return max(1, min(len(s), count))


def extract_linear(
    weight: Tensor, mode: Mode = "fixed", mode_param: float = 0, device: Any = "cpu"
) -> LowRankResult | FullResult:
    """Split a weight into low-rank factors and the residual.

    Returns `((down, up, rest), "low rank")` with weight = up·down + rest, or `(weight, "full")` if the rank would be at
    least half the output features. Shapes: weight (O, I), down (r, I), up (O, r), rest (O, I). For `mode` see
    `lycoris.utils.extract_diff`.
    """
    return _extract(weight, mode, mode_param, device, always=False)


def extract_conv(
    weight: Tensor, mode: Mode = "fixed", mode_param: float = 0, device: Any = "cpu", is_cp: bool = False
) -> LowRankResult | FullResult:
    """Split a convolution kernel (O, I, *K) into down (r, I, *K), up (O, r, 1, ...) and the residual.

    Otherwise as `extract_linear`. `is_cp` returns factors whatever the rank.
    """
    return _extract(weight, mode, mode_param, device, always=is_cp)


@torch.no_grad()
def _extract(weight: Tensor, mode: Mode, much: float, device: Any, *, always: bool) -> LowRankResult | FullResult:
    weight = weight.detach().to(device)
    out, inputs, *kernel = weight.shape
    if mode == "full":
        return weight, "full"
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    rank = min(out, inputs, select_rank(mode, much, s))
    if rank >= out / 2 and not always:
        return weight, "full"
    up, down = u[:, :rank] * s[:rank], v[:rank]
    rest = weight - (up @ down).reshape(weight.shape)
    return (down.reshape(rank, inputs, *kernel), up.reshape(out, rank, *(1 for _ in kernel)), rest), "low rank"
