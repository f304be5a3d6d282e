"""LoRA and LoCon."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.functional.general import weight_decompose
from lycoris.compat.functional.locon import diff_weight
from lycoris.compat.legacy_options import logger
from lycoris.compat.module_classes import LoConModule

__all__ = [
    "LoConModule",
    "LycorisBaseModule",
    "diff_weight",
    "logger",
    "weight_decompose",
]
