"""T-LoRA, and the masks that trainers set for it."""

from lycoris.dropin.keywords import logger
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import TLoraModule
from lycoris.dropin.tlora import clear_timestep_mask, compute_timestep_mask, get_timestep_mask, set_timestep_mask

__all__ = [
    "LycorisBaseModule",
    "TLoraModule",
    "clear_timestep_mask",
    "compute_timestep_mask",
    "get_timestep_mask",
    "logger",
    "set_timestep_mask",
]
