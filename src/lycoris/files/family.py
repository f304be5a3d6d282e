"""What a family is, as the modules that read and write files know it."""

from lycoris.families.family import Architecture, Family

__all__ = ["Architecture", "Family"]
