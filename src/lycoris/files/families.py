"""Families of models, as the modules that read and write files know them."""

from lycoris.families import ARCHITECTURES, FAMILIES

__all__ = ["ARCHITECTURES", "FAMILIES"]
