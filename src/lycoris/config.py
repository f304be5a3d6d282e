"""Built-in presets."""

from lycoris.dropin.presets import (
    BUILTIN_PRESET_CONFIGS,
    FULL_TEXT_ENCODER_MODULES,
    FULL_UNET_MODULES,
    FULL_UNET_NAMES,
    PRESET,
    list_builtin_presets,
)
from lycoris.dropin.sdk import AlgoOverride, PresetConfig

__all__ = [
    "BUILTIN_PRESET_CONFIGS",
    "FULL_TEXT_ENCODER_MODULES",
    "FULL_UNET_MODULES",
    "FULL_UNET_NAMES",
    "PRESET",
    "AlgoOverride",
    "PresetConfig",
    "list_builtin_presets",
]
