"""Contracts to run over an algorithm or a file format, in this library or in another.

from lycoris.testing import check_algorithm

def test_my_algorithm():
    check_algorithm(MyAlgorithm(rank=4))
"""

from __future__ import annotations

from lycoris.testing.algorithms import check_algorithm
from lycoris.testing.dialects import check_dialect

__all__ = ["check_algorithm", "check_dialect"]
