"""T-LoRA, and the masks that trainers set for it."""

from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.legacy_options import logger
from lycoris.compat.module_classes import TLoraModule
from lycoris.compat.timestep_masks import (
    clear_timestep_mask,
    compute_timestep_mask,
    get_timestep_mask,
    set_timestep_mask,
)

__all__ = [
    "LycorisBaseModule",
    "TLoraModule",
    "clear_timestep_mask",
    "compute_timestep_mask",
    "get_timestep_mask",
    "logger",
    "set_timestep_mask",
]
