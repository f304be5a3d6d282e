"""Consecutive rows of a matrix, and blocks of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowRange(NamedTuple):
    """`rows` rows of `total`, from `start` on; after the last row comes the first again.

    Rows count from 0. Nothing is checked: 0 <= start < total and rows <= total are up to the caller.
    """

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
        """Return these entries of an axis of `tensor`, which has `total` of them.

        A view where the range does not wrap, else a copy.
        """
        if not self.wraps:
            return tensor.narrow(axis, self.start, self.rows)
        first = self.total - self.start
        return torch.cat([tensor.narrow(axis, self.start, first), tensor.narrow(axis, 0, self.rows - first)], axis)

    def spread(self, tensor: Tensor) -> Tensor:
        """Return the reverse of `of` on the first axis: these rows at their places among all, with zeros elsewhere.

        Shapes: (rows, ...) → (total, ...). For `everything` it is the tensor itself.
        """
        if self.everything:
            return tensor
        rest = tensor.new_zeros(self.total - self.rows, *tensor.shape[1:])
        return torch.cat([tensor, rest]).roll(self.start, 0)

    def splits(self, size: int) -> bool:
        """Return whether a block of `size` rows is cut by the range, or blocks do not fill all rows.

        Blocks are counted from row 0, not from `start`.
        """
        return bool(self.start % size or self.rows % size or self.total % size)

    def blocks(self, size: int) -> RowRange:
        """Return the same range, counted in blocks of `size` rows.

        It must not split any: check with `splits`, since the rest of the division is dropped.
        """
        return RowRange(self.start // size, self.rows // size, self.total // size)

    def around(self, size: int) -> RowRange:
        """Return the least range with this one inside that splits no block of `size` rows.

        All rows where it wraps or where the last block is not complete; the range itself where it splits none.
        """
        if not self.splits(size):
            return self
        first, last = self.start // size, -(-(self.start + self.rows) // size)
        if self.wraps or last * size > self.total:
            return RowRange(0, self.total, self.total)
        return RowRange(first * size, (last - first) * size, self.total)

    def inside(self, outer: RowRange) -> RowRange:
        """Return where the range is in another that holds it, as rows of that one.

        `outer` must hold it, without wrapping between the two starts; this is not checked.
        """
        return RowRange(self.start - outer.start, self.rows, outer.rows)

    def part(self, run: RowRange) -> RowRange | None:
        """Return some of these rows, as rows of all; None where they are not consecutive there.

        Args:
            run: rows of these `rows`, so that its `total` is this `rows`.
        """
        if run.wraps and self.rows < self.total:
            return None
        return RowRange((self.start + run.start) % self.total, run.rows, self.total)
