"""How much of an adapter to keep: a rank, an energy, an error, or a file size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from lycoris.errors import ConfigError


class Truncatable(NamedTuple):
    """What the choice of a rank depends on for one layer."""

    energies: Tensor
    """(n + 1), ‖ΔW - ΔW_k‖² for k = 0 ... n; see `lycoris.ops.svd.Decomposition.energies`."""
    bytes_per_rank: int


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Exactly one of four.

    - `rank`: at most this many ranks a layer, from 1.
    - `energy`: per layer the smallest rank with Σ s² of what is kept ≥ energy · Σ s² of all; over 0, at most 1.
    - `error`: per layer the smallest rank with ‖ΔW - ΔW_k‖ ≤ error · ‖ΔW‖; at least 0, below 1.
    - `size`: bytes of the file. Ranks go where a byte takes away most of the squared error, so that the error of the
      whole file is as small as that size allows; each layer keeps one rank at least.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise ConfigError(f"give one of {names}; given were {' and '.join(given) or 'none'}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank is at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"energy is a share above 0 and up to 1, not {self.energy}")
        if self.error is not None and not 0 <= self.error < 1:
            raise ConfigError(f"error is a share from 0 and below 1, not {self.error}")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"size is a number of bytes from 1, not {self.size}")

    def choose_ranks(self, layers: Mapping[str, Truncatable], overhead: int = 0) -> dict[str, int]:
        """The rank of each layer; `overhead` is the bytes of what else is in the file.

        Raises `ConfigError` when not even one rank a layer fits into `size`.
        """
        if self.size is not None and layers:
            return _choose_ranks_for_size(self.size, layers, overhead)
        return {name: self._rank_of(layer.energies) for name, layer in layers.items()}

    def _rank_of(self, energies: Tensor) -> int:
        most = len(energies) - 1
        if self.rank is not None:
            return min(self.rank, most)
        share = 1 - self.energy if self.energy is not None else float(self.error or 0) ** 2
        # A rounding error is no rank.
        allowed = max(share, 1e-14) * float(energies[0])
        return max(1, int((energies > allowed).sum()))


def _choose_ranks_for_size(size: int, layers: Mapping[str, Truncatable], overhead: int) -> dict[str, int]:
    ranks = dict.fromkeys(layers, 1)
    left = size - overhead - sum(layer.bytes_per_rank for layer in layers.values())
    if left < 0:
        raise ConfigError(
            f"a file with one rank for each of {len(layers)} layers takes {size - left:,} bytes; given were {size:,}"
        )
    names = list(layers)
    gains, owners = [], []
    for at, name in enumerate(names):
        gain = -layers[name].energies.diff()[1:] / layers[name].bytes_per_rank
        gains.append(gain)
        owners.append(torch.full((len(gain),), at))
    order = torch.cat(gains).argsort(descending=True, stable=True)
    every_gain, every_owner = torch.cat(gains)[order], torch.cat(owners)[order]
    for gain, owner in zip(every_gain.tolist(), every_owner.tolist(), strict=True):
        name = names[owner]
        if gain <= 0:
            break
        if layers[name].bytes_per_rank <= left:
            ranks[name] += 1
            left -= layers[name].bytes_per_rank
    return ranks
