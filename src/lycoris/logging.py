"""The logger of this library, and messages logged once."""

from lycoris.compat.messages import ColoredFormatter, error_once, info_once, logger, warning_once

__all__ = [
    "ColoredFormatter",
    "error_once",
    "info_once",
    "logger",
    "warning_once",
]
