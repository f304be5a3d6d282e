"""The logger of this library. It has no handler: the program that imports it decides where messages go."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache

logger = logging.getLogger("LyCORIS")

LEVEL_COLORS: Mapping[str, str] = {
    "DEBUG": "\033[0;36m",
    "INFO": "\033[0;32m",
    "WARNING": "\033[0;33m",
    "ERROR": "\033[0;31m",
    "CRITICAL": "\033[0;37;41m",
}
RESET_COLOR = "\033[0m"


class ColoredFormatter(logging.Formatter):
    """A log formatter that colors the level name with ANSI codes."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a copy of the record, so that other handlers see the level name without color."""
        colored = logging.makeLogRecord(vars(record))
        colored.levelname = f"{LEVEL_COLORS.get(record.levelname, RESET_COLOR)}{record.levelname}{RESET_COLOR}"
        return super().format(colored)


@cache
def info_once(msg: str) -> None:
    """Log a message at level INFO, once per process.

    Later calls with the same text do nothing.
    """
    logger.info(msg)


@cache
def warning_once(msg: str) -> None:
    """Log a warning, once per process.

    Later calls with the same text do nothing.
    """
    logger.warning(msg)


@cache
def error_once(msg: str) -> None:
    """Log an error, once per process.

    Later calls with the same text do nothing.
    """
    logger.error(msg)
