"""Full fine-tuning."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.functional.general import add_scaled
from lycoris.compat.legacy_options import logger
from lycoris.compat.module_classes import FullModule

__all__ = [
    "FullModule",
    "LycorisBaseModule",
    "add_scaled",
    "logger",
]
