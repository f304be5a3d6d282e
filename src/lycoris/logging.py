"""The logger of this library."""

from lycoris.dropin.making import logger

__all__ = ["logger"]
