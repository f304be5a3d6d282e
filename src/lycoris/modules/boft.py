"""BOFT."""

from lycoris.dropin.modules import ButterflyOFTModule

__all__ = ["ButterflyOFTModule"]
