"""What was in force at a forward pass, for its recomputation during backward.

Gradient checkpointing runs a layer's forward again while the backward pass is under way. By then a trainer may have
changed the strength or cleared the timestep mask; the recomputation must see what the first run saw. Which first run
it repeats is told by the input: the same layer gets the same values again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from lycoris.algorithm import Call

LIMIT = 16
SAMPLE = 16


@dataclass(frozen=True)
class _Record:
    call: Call
    probe: Tensor


class Recall:
    """The last few distinct calls of one adapter, with a few values of the input that each had."""

    def __init__(self) -> None:
        self._records: deque[_Record] = deque(maxlen=LIMIT)

    def note(self, call: Call, x: Tensor) -> None:
        """Remember a forward pass: every one under a mask, else one per change of strength."""
        if call.keep is not None or not self._records or self._records[-1].call is not call:
            self._records.append(_Record(call, _probe(x)))

    def of(self, now: Call, x: Tensor) -> Call:
        """The call whose forward pass is being recomputed with input `x`; `now` when none is known."""
        if len(self._records) < 2:
            return self._records[0].call if self._records else now
        probe = _probe(x)
        newest_first = list(reversed(self._records))
        fitting = [record for record in newest_first if record.probe.shape == probe.shape]
        # `min` takes the first of equals: of passes with the same input, the newest.
        return min(fitting or newest_first[:1], key=lambda record: _distance(record.probe, probe)).call


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread, as `torch.utils.checkpoint` itself asks it."""
    return torch._C._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Whether a backward pass may follow that runs this forward pass again.

    Without gradients only the forward of an autograd function is, which is how reentrant checkpointing runs a layer
    the first time; torch turns forward-mode gradients off there too, and leaves them on under plain `no_grad`.
    """
    return torch.is_grad_enabled() or not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape and a.numel() else 0.0


def _probe(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float().clone()
