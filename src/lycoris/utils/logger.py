"""The logger of this library. Importing this module does not configure it."""

from lycoris.compat.messages import ColoredFormatter, logger

__all__ = [
    "ColoredFormatter",
    "logger",
]
