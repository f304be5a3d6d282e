"""LoHa."""

from lycoris.dropin.modules import LohaModule

__all__ = ["LohaModule"]
