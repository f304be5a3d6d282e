"""The change of the weight itself."""

from lycoris.dropin.functional.general import add_scaled
from lycoris.dropin.keywords import logger
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import FullModule

__all__ = [
    "FullModule",
    "LycorisBaseModule",
    "add_scaled",
    "logger",
]
