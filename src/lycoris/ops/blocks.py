"""Consecutive rows of a matrix, and blocks of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowRange(NamedTuple):
    """`rows` rows of `total`, from `start` on; after the last row comes the first again."""

    start: int
    rows: int
    total: int

    @property
    def wraps(self) -> bool:
        return self.start + self.rows > self.total

    @property
    def everything(self) -> bool:
        """Whether it is all rows in their own order."""
        return self.start == 0 and self.rows == self.total

    def of(self, tensor: Tensor, axis: int = 0) -> Tensor:
        """These entries of an axis; a view where they do not wrap."""
        if not self.wraps:
            return tensor.narrow(axis, self.start, self.rows)
        first = self.total - self.start
        return torch.cat([tensor.narrow(axis, self.start, first), tensor.narrow(axis, 0, self.rows - first)], axis)

    def spread(self, tensor: Tensor) -> Tensor:
        """The reverse of `of` on the first axis: at their places among all, with zeros elsewhere."""
        if self.everything:
            return tensor
        rest = tensor.new_zeros(self.total - self.rows, *tensor.shape[1:])
        return torch.cat([tensor, rest]).roll(self.start, 0)

    def splits(self, size: int) -> bool:
        """Whether it holds a part of a block of `size` rows without the rest, or blocks do not fill all rows."""
        return bool(self.start % size or self.rows % size or self.total % size)

    def blocks(self, size: int) -> RowRange:
        """The same, counted in blocks of `size` rows, none of which it may split."""
        return RowRange(self.start // size, self.rows // size, self.total // size)

    def around(self, size: int) -> RowRange:
        """The least run with it inside that splits no block of `size` rows."""
        if not self.splits(size):
            return self
        first, last = self.start // size, -(-(self.start + self.rows) // size)
        if self.wraps or last * size > self.total:
            return RowRange(0, self.total, self.total)
        return RowRange(first * size, (last - first) * size, self.total)

    def inside(self, outer: RowRange) -> RowRange:
        """Where it is in a run that holds it."""
        return RowRange(self.start - outer.start, self.rows, outer.rows)

    def part(self, run: RowRange) -> RowRange | None:
        """Some of these rows, as rows of all; None where they are not consecutive there."""
        if run.wraps and self.rows < self.total:
            return None
        return RowRange((self.start + run.start) % self.total, run.rows, self.total)
