"""What each step trains on, as a pure function of the seed and the number of the batch: no state to save or restore."""

from __future__ import annotations

import random

import torch

from lycoris.training.cache import Cached
from lycoris.training.objective import Batch


def draw(
    data: Cached, no_text: torch.Tensor, *, seed: int, index: int, size: int, timesteps: int, dropout: float
) -> Batch:
    """Batch number `index`: its images, fresh noise, uniform timesteps, and `no_text` (L, D) for a share `dropout`."""
    rows = torch.tensor(order(len(data), seed=seed, start=index * size, count=size))
    generator = torch.Generator().manual_seed(_mix(seed, "batch", index))
    clean = data.latents[rows]
    noise = torch.randn(clean.shape, generator=generator)
    when = torch.randint(timesteps, (size,), generator=generator)
    dropped = torch.rand(size, generator=generator) < dropout
    text = torch.where(dropped[:, None, None], no_text, data.text[rows])
    return Batch(clean, noise, when, text)


def order(length: int, *, seed: int, start: int, count: int) -> list[int]:
    """Places `start` to `start + count` of an endless sequence: all rows shuffled, then all reshuffled, and so on."""
    places = range(start, start + count)
    shuffled = {}
    for epoch in {place // length for place in places}:
        rows = list(range(length))
        random.Random(_mix(seed, "epoch", epoch)).shuffle(rows)
        shuffled[epoch] = rows
    return [shuffled[place // length][place % length] for place in places]


def _mix(seed: int, purpose: str, index: int) -> int:
    # Hashed as text, so that seed 1, index 2 and seed 2, index 1 share nothing.
    return random.Random(f"{seed} {purpose} {index}").getrandbits(63)
