"""The logger of this library, and messages that it gives once."""

from lycoris.compat.messages import ColoredFormatter, error_once, info_once, logger, warning_once

__all__ = [
    "ColoredFormatter",
    "error_once",
    "info_once",
    "logger",
    "warning_once",
]
