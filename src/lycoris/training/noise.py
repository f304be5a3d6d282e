"""The random draws of each step, as a pure function of the seed and the batch index: no state to save or restore."""

from __future__ import annotations

import random

import torch

from lycoris.training.cache import CachedExamples
from lycoris.training.objective import Batch


def draw_batch(
    data: CachedExamples, no_text: torch.Tensor, *, seed: int, index: int, size: int, timesteps: int, dropout: float
) -> Batch:
    """Return batch number `index`: its images, fresh noise and uniformly drawn timesteps.

    Args:
        no_text: (L, D), the embedding of the empty caption.
        size: Number of samples in the batch.
        timesteps: Number of training timesteps; they are drawn from 0 to `timesteps` - 1.
        dropout: Probability, from 0 to 1, that a sample gets `no_text` instead of its caption.
    """
    rows = torch.tensor(pick_rows(len(data), seed=seed, start=index * size, count=size))
    generator = torch.Generator().manual_seed(_mix_seed(seed, "batch", index))
    clean = data.latents[rows]
    noise = torch.randn(clean.shape, generator=generator)
    when = torch.randint(timesteps, (size,), generator=generator)
    dropped = torch.rand(size, generator=generator) < dropout
    text = torch.where(dropped[:, None, None], no_text, data.text[rows])
    return Batch(clean, noise, when, text)


def pick_rows(length: int, *, seed: int, start: int, count: int) -> list[int]:
    """Return the row numbers at positions `start` to `start + count` of an endless sequence of shuffled epochs.

    Each epoch has all `length` rows once, in an order of its own that depends on `seed`.
    """
    places = range(start, start + count)
    shuffled = {}
    for epoch in {place // length for place in places}:
        rows = list(range(length))
        random.Random(_mix_seed(seed, "epoch", epoch)).shuffle(rows)
        shuffled[epoch] = rows
    return [shuffled[place // length][place % length] for place in places]


def _mix_seed(seed: int, purpose: str, index: int) -> int:
    # Hashed as text, so that seed 1, index 2 and seed 2, index 1 share nothing.
    return random.Random(f"{seed} {purpose} {index}").getrandbits(63)
