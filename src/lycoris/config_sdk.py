"""Presets and algorithms as values, for user interfaces."""

from lycoris.dropin.sdk import (
    VALID_PRESET_KEYS,
    AlgoOverride,
    AlgoSpec,
    PresetConfig,
    PresetValidationError,
    describe_algo,
    list_algorithms,
)

__all__ = [
    "VALID_PRESET_KEYS",
    "AlgoOverride",
    "AlgoSpec",
    "PresetConfig",
    "PresetValidationError",
    "describe_algo",
    "list_algorithms",
]
