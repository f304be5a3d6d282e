"""LoKr."""

from lycoris.dropin.modules import LokrModule

__all__ = ["LokrModule"]
