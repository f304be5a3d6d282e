"""Rounding to a narrower format: to nearest, or up or down by chance so that the mean stays where it was."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return x in at least float32, since products and sums in half precision are rounded at every step.

    float64 stays as it is; every format of one byte becomes float32.
    """
    # Of one byte torch promotes nothing.
    return x.to(torch.float32 if x.itemsize == 1 else torch.promote_types(x.dtype, torch.float32))


def to_integers(x: Tensor, low: int, high: int, generator: torch.Generator | None = None) -> Tensor:
    """Return x on the whole numbers low to high, both included, still in x's dtype.

    A generator makes the rounding stochastic: E[y] = x within the limits. None rounds to nearest, halves to even.
    """
    whole = torch.round(x) if generator is None else _up_or_down(x, generator)
    return whole.clamp(low, high)


def to_dtype(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """x (float32 or float64) in another floating-point dtype. A generator makes the rounding stochastic: E[y] = x.

    Eight-bit formats saturate: a plain cast would make NaN of what is beyond their largest number.
    """
    limit = torch.finfo(dtype)
    if generator is not None and limit.bits < torch.finfo(x.dtype).bits:
        # Neighbors in the target format are eps·2^e apart, with e the exponent of x, or of the smallest normal number.
        exponent = torch.frexp(x.abs().clamp_min(limit.tiny)).exponent - 1
        step = torch.ldexp(torch.full_like(x, limit.eps), exponent)
        x = (_up_or_down(x / step, generator) * step).clamp(limit.min, limit.max)
    elif limit.bits == 8:
        x = x.clamp(limit.min, limit.max)
    return x.to(dtype)


def _up_or_down(x: Tensor, generator: torch.Generator) -> Tensor:
    below = torch.floor(x)
    chance = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return below + (chance < x - below).to(x.dtype)
