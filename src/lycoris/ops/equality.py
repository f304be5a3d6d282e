"""Tensors that are the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether tensors by name are the same numbers in the same precision.

    The order of names does not matter. Tensors that are the same objects are not compared, which is the common case.
    """
    if one.keys() != other.keys():
        return False
    return all(identical(one[name], other[name]) for name in one)


def identical(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same numbers in the same precision; of ones without numbers, the same object.

    Ones without numbers are on the meta device. Tensors with NaN differ from everything but themselves, except in
    float8, which is compared by its bytes.
    """
    if a is b or a.is_meta or b.is_meta:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Of one byte torch compares nothing.
    small = a.is_floating_point() and a.itemsize == 1
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if small else torch.equal(a, b)
