"""Numbers."""

from lycoris.compat.values import product

__all__ = [
    "product",
]
