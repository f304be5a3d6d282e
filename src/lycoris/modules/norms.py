"""Norms."""

from lycoris.dropin.modules import NormModule

__all__ = ["NormModule"]
