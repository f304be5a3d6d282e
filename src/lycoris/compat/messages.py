"""The logger of this library. No handler is put on it: the program that imports this says where messages go."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache

logger = logging.getLogger("LyCORIS")

COLORS: Mapping[str, str] = {
    "DEBUG": "\033[0;36m",
    "INFO": "\033[0;32m",
    "WARNING": "\033[0;33m",
    "ERROR": "\033[0;31m",
    "CRITICAL": "\033[0;37;41m",
}
RESET = "\033[0m"


class ColoredFormatter(logging.Formatter):
    """A formatter with the level in colour."""

    def format(self, record: logging.LogRecord) -> str:
        """As a formatter does, of a copy of the record."""
        colored = logging.makeLogRecord(vars(record))
        colored.levelname = f"{COLORS.get(record.levelname, RESET)}{record.levelname}{RESET}"
        return super().format(colored)


@cache
def info_once(msg: str) -> None:
    """A message that a process gives once."""
    logger.info(msg)


@cache
def warning_once(msg: str) -> None:
    """A warning that a process gives once."""
    logger.warning(msg)


@cache
def error_once(msg: str) -> None:
    """An error that a process logs once."""
    logger.error(msg)
