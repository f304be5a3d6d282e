"""Batches as a pure function of seed and number."""

from __future__ import annotations

import torch

from lycoris.training.cache import CachedExamples
from lycoris.training.noise import draw_batch, pick_rows


def test_every_epoch_holds_every_row_once_whatever_the_batch_size() -> None:
    whole = pick_rows(5, seed=1, start=0, count=15)
    assert [sorted(whole[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert whole[:5] != whole[5:10]
    assert [place for start in range(0, 15, 3) for place in pick_rows(5, seed=1, start=start, count=3)] == whole


def test_a_batch_is_the_same_whenever_it_is_drawn() -> None:
    data = CachedExamples(torch.arange(4.0).reshape(4, 1, 1, 1), torch.ones(4, 2, 3))
    empty = torch.zeros(2, 3)

    def batch(index: int, dropout: float = 0.0) -> torch.Tensor:
        drawn = draw_batch(data, empty, seed=3, index=index, size=4, timesteps=1000, dropout=dropout)
        return torch.cat([value.float().flatten() for value in (drawn.clean, drawn.noise, drawn.timesteps, drawn.text)])

    torch.testing.assert_close(batch(6), batch(6), rtol=0, atol=0)
    assert not torch.equal(batch(6), batch(7))
    assert batch(6)[-24:].eq(1).all()
    assert batch(6, dropout=1.0)[-24:].eq(0).all()
