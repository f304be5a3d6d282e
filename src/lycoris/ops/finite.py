"""Whether all values of a tensor are finite."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity.

    True for integers and for tensors without elements. On a GPU it waits for the result.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # NaN is both; many times as fast as a test of every number. Of one byte torch has no order.
    least, most = (tensor.half() if tensor.itemsize == 1 else tensor).aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(most))
