"""Tensors that are the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether tensors by name are the same numbers in the same precision, mostly because they are the same objects."""
    if one.keys() != other.keys():
        return False
    pairs = [(one[name], other[name]) for name in one]
    return all(a is b or (a.dtype == b.dtype and a.shape == b.shape and _equal(a, b)) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    # Of one byte torch compares nothing.
    small = a.is_floating_point() and a.itemsize == 1
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if small else torch.equal(a, b)
