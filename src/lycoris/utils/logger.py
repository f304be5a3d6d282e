"""The logger of this library. Importing this changes nothing about it."""

from lycoris.compat.messages import ColoredFormatter, logger

__all__ = [
    "ColoredFormatter",
    "logger",
]
