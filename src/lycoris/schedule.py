"""What changes with the diffusion timestep: how many ranks of a T-LoRA count (arXiv:2507.05964, eq. 4)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lycoris.errors import ConfigError

Unit = Literal["steps", "fraction", "reversed"]

TIMESTEP_UNITS: Mapping[str, Unit] = MappingProxyType(
    {
        "FluxTransformer2DModel": "fraction",
        "Flux2Transformer2DModel": "fraction",
        "ChromaTransformer2DModel": "fraction",
        "QwenImageTransformer2DModel": "fraction",
        "ZImageTransformer2DModel": "reversed",
        "Lumina2Transformer2DModel": "reversed",
    }
)
"""What diffusers' own pipelines hand to a denoiser as its timestep; classes not listed get steps of 0..T.

fraction: t/T. reversed: 1 - t/T.
"""


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """r(t) = floor(((T - t)/T)^alpha · (max_rank - min_rank)) + min_rank.

    t runs from 0 (clean) to T (noise) and is clamped to that range, so min_rank ≤ r ≤ max_rank.
    """

    max_rank: int
    min_rank: int = 1
    """Ranks that count at pure noise."""
    alpha: float = 1.0
    """Exponent: 1 is linear, above 1 keeps more ranks for the late, detailed steps."""
    steps: int = 1000
    """T, the number of training timesteps of the noise scheduler."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_rank <= self.max_rank:
            raise ConfigError(f"min rank must lie between 0 and the rank {self.max_rank}, not {self.min_rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"the schedule's exponent must be positive, not {self.alpha}")
        if self.steps < 1:
            raise ConfigError(f"the number of training timesteps must be positive, not {self.steps}")

    def rank(self, t: float) -> int:
        """Active ranks at timestep t."""
        clean = (self.steps - min(max(float(t), 0.0), self.steps)) / self.steps
        return min(self.max_rank, math.floor(clean**self.alpha * (self.max_rank - self.min_rank)) + self.min_rank)

    def mask(self, timesteps: Tensor | float) -> Tensor:
        """(B, max_rank) of ones for the ranks that count and zeros for the others, for B timesteps on 0..T."""
        values = torch.as_tensor(timesteps).reshape(-1).tolist()
        ranks = torch.tensor([self.rank(t) for t in values]).unsqueeze(1)
        return (torch.arange(self.max_rank) < ranks).float()


def takes_timestep(model: nn.Module) -> bool:
    """Whether a model is called with a timestep that `read_timestep` finds."""
    return "timestep" in inspect.signature(model.forward).parameters


def read_timestep(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], steps: int) -> Tensor:
    """The timestep with which a denoiser is being called, on the scale 0..steps, whatever unit its class takes."""
    if "timestep" in kwargs:
        given = kwargs["timestep"]
    else:
        names = list(inspect.signature(model.forward).parameters)
        at = names.index("timestep") if "timestep" in names else len(args)
        if at >= len(args):
            raise ConfigError(f"{type(model).__name__} was called without a timestep, which T-LoRA's schedule needs")
        given = args[at]
    t = torch.as_tensor(given).detach().reshape(-1).double()
    unit = TIMESTEP_UNITS.get(type(model).__name__, "steps")
    if unit == "steps":
        return t
    # A division by T in float32 leaves t a hair off; a hair below a whole step can be a rank less.
    return ((t if unit == "fraction" else 1 - t) * steps).round(decimals=3)
