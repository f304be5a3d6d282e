"""T-LoRA, and the masks that trainers set for it."""

from lycoris.dropin.modules import TLoraModule
from lycoris.dropin.tlora import clear_timestep_mask, compute_timestep_mask, get_timestep_mask, set_timestep_mask

__all__ = [
    "TLoraModule",
    "clear_timestep_mask",
    "compute_timestep_mask",
    "get_timestep_mask",
    "set_timestep_mask",
]
