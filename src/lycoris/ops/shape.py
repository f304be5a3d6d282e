"""Giving the result of a product the shape of an activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unflattened(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that was just made, and that nothing keeps, in another shape; not as a view of it.

    FSDP2 hangs the gathering of parameters for backward on a module's output, which work in place on a view would lose.
    """
    return torch.ops.aten._unsafe_view(fresh, list(shape))
