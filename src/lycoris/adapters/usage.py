"""What has happened to an adapter so far, as flags that a forward pass sets and nothing waits for."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Return whether `torch.export` traces the pass, which takes a flag that is set for a fault.

    Always false before torch 2.7, which cannot tell.
    """
    # torch before 2.7 has no such question.
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


class Seen:
    """What has happened to an adapter since it was attached: flags that only ever become true.

    Plain attributes, only ever written in a pass: a compiled graph neither breaks nor is made again for them.
    """

    __slots__ = ("called", "cut", "ran", "reached", "trained")

    def __init__(self) -> None:
        self.called = False
        """Whether a pass came through it."""
        self.trained = False
        """Whether one did in which it acted and gradients were on."""
        self.reached = False
        """Whether a gradient reached its parameters, as far as `lycoris.adapters.watching` waited for one."""
        self.ran = False
        """Whether the model was called."""
        self.cut = False
        """Whether its layer gave an output without a gradient for an input with one."""
