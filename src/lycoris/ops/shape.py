"""Giving the result of a product the shape of an activation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lycoris.ops.torch_private import unsafe_view


def unflatten(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that was just made, and that nothing keeps, in another shape; not as a view of it.

    FSDP2 hangs the gathering of parameters for backward on a module's output, which work in place on a view would lose.
    """
    found: Tensor = unsafe_view(fresh, list(shape))
    return found
