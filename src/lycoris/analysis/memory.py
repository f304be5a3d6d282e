"""What training adapters takes in memory, known from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lycoris.analysis.explain import Explanation, size_text
from lycoris.errors import ConfigError, unknown

WIDTH = 4
"""Bytes of a number of an adapter in training: float32."""

LayerShape = tuple[int, ...]


def _eight_bit(shape: LayerShape) -> int:
    """bitsandbytes: two states of a byte and a float32 for each 256 of them; small tensors stay in float32."""
    n = math.prod(shape)
    return 8 * n if n < 4096 else 2 * (n + 4 * -(-n // 256))


def _adafactor_bytes(shape: LayerShape) -> int:
    """Adafactor without momentum: the last two axes as a row and a column."""
    if len(shape) < 2:
        return 4 * math.prod(shape)
    return 4 * math.prod(shape[:-2]) * (shape[-2] + shape[-1])


OPTIMIZERS: Mapping[str, Callable[[LayerShape], int]] = {
    "adamw": lambda shape: 8 * math.prod(shape),
    "adamw8bit": _eight_bit,
    "adafactor": _adafactor_bytes,
    "lion": lambda shape: 4 * math.prod(shape),
    "prodigy": lambda shape: 16 * math.prod(shape),
    "sgd": lambda shape: 0,
    "sgd-momentum": lambda shape: 4 * math.prod(shape),
}
"""Bytes of state for a float32 parameter of a shape."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes in training, by what they are for. What a frozen base keeps for its own backward is not among them.

    Nor is what operations need while they run, or what the allocator holds in reserve.
    """

    base: int
    """All weights of the model."""
    adapters: int
    """Adapters' tensors in float32, frozen ones too."""
    gradients: int
    """Of the trained ones."""
    optimizer: int
    """Its state."""
    kept: int
    """What adapters keep for backward beside the layers' inputs, without gradient checkpointing."""

    inputs: int
    """Inputs of adapted layers, which a frozen layer would not keep; less where layers share one, or where the model
    keeps it for something else."""

    @property
    def total(self) -> int:
        return self.base + self.adapters + self.gradients + self.optimizer + self.kept + self.inputs

    def as_dict(self) -> dict[str, Any]:
        """Return bytes by field, and their sum under "total", as JSON has it."""
        return asdict(self) | {"total": self.total}

    def rows(self) -> list[tuple[str, str]]:
        """Return pairs of words: what it is for, and how much.

        In the order of the fields, with the sum last.
        """
        words = {
            "base": "base weights",
            "adapters": "adapters",
            "gradients": "gradients of adapters",
            "optimizer": "optimizer state",
            "kept": "activations inside adapters",
            "inputs": "inputs of their layers, at most",
        }
        return [(label, size_text(getattr(self, name))) for name, label in words.items()] + [
            ("sum", size_text(self.total))
        ]

    def __str__(self) -> str:
        return "\n".join(f"{label:34s}{size:>10s}" for label, size in self.rows())


def memory(explained: Explanation, base_parameters: int, *, optimizer: str = "adamw", batch: int = 1) -> Memory:
    """What training takes, for a base in the explanation's precision and a batch of passes over its tokens.

    Every adapted layer is taken to see all tokens of a pass. Raises `ConfigError` for an optimizer that is not known.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(unknown("optimizer", optimizer, OPTIMIZERS))
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, not {batch}")
    state = OPTIMIZERS[optimizer]
    frozen = sum(layer.frozen for layer in explained.layers)
    return Memory(
        base=base_parameters * explained.dtype.itemsize,
        adapters=WIDTH * (explained.parameters + frozen),
        gradients=WIDTH * explained.parameters,
        optimizer=sum(state(shape) for layer in explained.layers for shape in layer.shapes),
        kept=explained.saved_bytes * explained.tokens * batch,
        inputs=explained.inputs * explained.tokens * batch,
    )
