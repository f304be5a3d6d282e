"""Namings of layers, as the modules that read and write files know them."""

from lycoris.families.naming import DIFFUSERS, Naming, Span, Table

__all__ = ["DIFFUSERS", "Naming", "Span", "Table"]
