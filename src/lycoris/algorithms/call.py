"""What is in force for one forward pass: strength, rank mask and dropout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lycoris.errors import PlanError
from lycoris.layers.batch_layout import BatchLayout


@dataclass(frozen=True, eq=False)
class Call:
    """What is in force for one forward pass. It is never saved with the adapter.

    Frozen: `PassHooks.sample_dropout` returns a changed copy.
    """

    strength: Tensor | float = 1.0
    """μ: a number, or a 0-d tensor where a compiled graph must not depend on its value."""
    rank_mask: Tensor | None = None
    """Weight of each rank, mostly 0 or 1: (1, r), or (B, r) for a batch. None: every rank counts fully."""
    layout: BatchLayout | None = None
    """Which entries of an input belong to which row of `rank_mask`. None: a mask of one row."""
    dropout_scale: Tensor | None = None
    """Factor of every dropout probability: 1 in training, 0 in evaluation. None: no dropout."""


@dataclass(frozen=True, kw_only=True)
class PassHooks:
    """What may differ from one forward pass to the next: dropout, and rank masks from a timestep schedule.

    All random numbers are drawn in `sample_dropout`, so that recomputation and the rest of the maths are deterministic.
    """

    module_dropout: float = 0.0
    """Probability that a training step skips the adapter of a layer, in [0, 1)."""

    @property
    def has_dropout(self) -> bool:
        """Whether training passes draw random numbers. Evaluation never does."""
        return self.module_dropout > 0

    def sample_dropout(self, call: Call, x: Tensor) -> Call:
        """Return the call with this pass's random choices made, drawn on the device of `x`.

        Override to add choices, starting from `super().sample_dropout(call, x)`. Does nothing while
        `call.dropout_scale` is None.
        """
        if call.dropout_scale is None or not self.module_dropout:
            return call
        alive = torch.rand((), device=x.device) >= call.dropout_scale * self.module_dropout
        return replace(call, strength=call.strength * alive)

    @property
    def uses_rank_mask(self) -> bool:
        """Whether a timestep schedule sets the rank mask of this algorithm."""
        return False

    def fit_rank_mask(self, rank_mask: Tensor) -> Tensor:
        """Return a mask (..., n) of any length over exactly the ranks of this algorithm.

        Called only where `uses_rank_mask` is true.
        """
        return rank_mask


def require_one_mask(rank_mask: Tensor) -> Tensor:
    """Return the rank mask (r) that all samples of a call share.

    Raises:
        PlanError: the samples have different masks, and one dense weight cannot follow them all.
    """
    if rank_mask.dim() == 1:
        return rank_mask
    if rank_mask.shape[0] != 1:
        raise PlanError(
            f"a dense weight is needed here, and one weight cannot follow {rank_mask.shape[0]} masks; put algorithms "
            "that need the weight (DoRA) below the one with a timestep schedule, or give all samples one mask"
        )
    return rank_mask[0]


def apply_dropout(x: Tensor, probability: Tensor) -> Tensor:
    """Zero elements of x at random and divide the others by 1 - p.

    `probability` is a 0-d tensor, so that training and evaluation are one compiled graph.
    """
    kept = torch.rand(x.shape, device=x.device) >= probability
    return x * kept / (1 - probability).to(x.dtype)
