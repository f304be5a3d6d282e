"""Diag-OFT."""

from lycoris.dropin.modules import DiagOFTModule

__all__ = ["DiagOFTModule"]
