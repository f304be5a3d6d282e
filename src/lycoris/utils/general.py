"""A function for numbers."""

from lycoris.compat.values import product

__all__ = [
    "product",
]
