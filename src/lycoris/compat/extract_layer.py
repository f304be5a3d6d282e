"""One layer's change as a LoRA: by how many singular values it is kept."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lycoris.errors import ConfigError, unknown

Mode = Literal["fixed", "threshold", "ratio", "quantile", "percentile", "full"]

Factors = tuple[tuple[Tensor, Tensor, Tensor], Literal["low rank"]]
Whole = tuple[Tensor, Literal["full"]]


def rank_for(mode: Mode, much: float, s: Tensor) -> int:
    """How many singular values, largest first, are kept: at least one. See `lycoris.utils.extract_diff`.

    Raises `ConfigError` for an unknown mode.
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


def extract_linear(weight: Tensor, mode: Mode = "fixed", mode_param: float = 0, device: Any = "cpu") -> Factors | Whole:
    """`((down, up, rest), "low rank")` with weight = up·down + rest, or `(weight, "full")` where that keeps half of it.

    Shapes: weight (O, I) → down (r, I), up (O, r), rest (O, I).
    """
    return _extract(weight, mode, mode_param, device, always=False)


def extract_conv(
    weight: Tensor, mode: Mode = "fixed", mode_param: float = 0, device: Any = "cpu", is_cp: bool = False
) -> Factors | Whole:
    """The same for a kernel (O, I, *K): down (r, I, *K), up (O, r, 1, ...). `is_cp`: factors whatever the rank."""
    return _extract(weight, mode, mode_param, device, always=is_cp)


@torch.no_grad()
def _extract(weight: Tensor, mode: Mode, much: float, device: Any, *, always: bool) -> Factors | Whole:
    weight = weight.detach().to(device)
    out, inputs, *kernel = weight.shape
    if mode == "full":
        return weight, "full"
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    rank = min(out, inputs, rank_for(mode, much, s))
    if rank >= out / 2 and not always:
        return weight, "full"
    up, down = u[:, :rank] * s[:rank], v[:rank]
    rest = weight - (up @ down).reshape(weight.shape)
    return (down.reshape(rank, inputs, *kernel), up.reshape(out, rank, *(1 for _ in kernel)), rest), "low rank"
