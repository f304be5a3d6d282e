"""Splitting a dimension into two factors, as LoKr files do."""

from __future__ import annotations

import math


def factorize(n: int, factor: int = -1) -> tuple[int, int]:
    """(m, k) with m·k = n and m ≤ k.

    A positive `factor` that divides n is one of the two. Otherwise m is the largest divisor of n that exceeds neither
    √n nor `factor` (negative: no limit). Example: (128, -1) → (8, 16); (128, 64) → (2, 64); (250, 4) → (2, 125).
    """
    if factor > 0 and n % factor == 0:
        return min(factor, n // factor), max(factor, n // factor)
    limit = math.isqrt(n) if factor < 0 else min(math.isqrt(n), max(factor, 1))
    small = next(m for m in range(limit, 0, -1) if n % m == 0)
    return small, n // small
