"""What the module classes have in common."""

from lycoris.dropin.module import LycorisBaseModule

__all__ = ["LycorisBaseModule"]
