"""Splitting a dimension into two factors, as LoKr files do."""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def factorize(n: int, factor: int = -1) -> tuple[int, int]:
    """(m, k) with m·k = n and m ≤ k.

    A positive `factor` that divides n is one of the two. Otherwise m is the largest divisor of n that exceeds neither
    √n nor `factor` (negative: no limit). Example: (128, -1) → (8, 16); (128, 64) → (2, 64); (250, 4) → (2, 125).
    """
    # A layer asks in every pass; a compiler has to see through it.
    return (_factorize.__wrapped__ if torch.compiler.is_compiling() else _factorize)(n, factor)


@lru_cache(4096)
def _factorize(n: int, factor: int) -> tuple[int, int]:
    if factor > 0 and n % factor == 0:
        return min(factor, n // factor), max(factor, n // factor)
    limit = math.isqrt(n) if factor < 0 else min(math.isqrt(n), max(factor, 1))
    small = next(m for m in range(limit, 0, -1) if n % m == 0)
    return small, n // small


def nearest_divisor(n: int, wanted: int) -> int:
    """Return the divisor of n closest to the one wanted; of two that are as close, the smaller.

    Tries all numbers up to n, which must be at least 1.
    """
    return min((m for m in range(1, n + 1) if n % m == 0), key=lambda m: (abs(m - wanted), m))


def butterfly_sizes(n: int) -> list[int]:
    """Return the even block sizes s, ascending, for which n is s times a power of two.

    Example: 12 → [6, 12]. Empty for odd n.
    """
    sizes = (n >> power for power in range(n.bit_length()) if n % (1 << power) == 0)
    return sorted(size for size in sizes if size % 2 == 0)
