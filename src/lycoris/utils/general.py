"""Numbers."""

from lycoris.dropin.values import product

__all__ = [
    "product",
]
