"""How other programs evaluate the tensors of one layer, each written down once from what was measured on them.

They share nothing with the library, so that the two can be held against each other, and they keep the programs'
defects. A reader is `read(tensors, weight, bias, kind, strength)`: tensors by their name in the file, weight (O, I, *K)
and bias of the layer, its kind. It gives the new weight and bias, raises `Refused` where the program does so aloud, and
gives None where the program goes on without a word, or with one in its log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

Kind = Literal["linear", "conv", "norm", "embedding", "parameter"]
Tensors = Mapping[str, Tensor]
Read = tuple[Tensor, Tensor | None]


class Refused(Exception):  # noqa: N818 -- what the program did
    """The program stops, or rejects the file, and says so."""


def number(tensors: Tensors, name: str) -> float | None:
    """A setting that is kept as a tensor."""
    return float(tensors[name]) if name in tensors else None


def moved(bias: Tensor | None, change: Tensor | None, strength: float) -> Tensor | None:
    """A bias with its own change."""
    if change is None:
        return bias
    return change * strength if bias is None else bias + change * strength
