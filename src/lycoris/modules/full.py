"""Full."""

from lycoris.dropin.modules import FullModule

__all__ = ["FullModule"]
