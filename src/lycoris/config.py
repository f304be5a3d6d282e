"""Built-in presets."""

from lycoris.compat.config_sdk import AlgoOverride, PresetConfig
from lycoris.compat.presets import (
    BUILTIN_PRESET_CONFIGS,
    FULL_TEXT_ENCODER_MODULES,
    FULL_UNET_MODULES,
    FULL_UNET_NAMES,
    PRESET,
    list_builtin_presets,
)

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
