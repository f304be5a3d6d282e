"""Presets and algorithms as values, for user interfaces."""

from lycoris.compat.config_sdk import (
    ALGO_REGISTRY,
    VALID_PRESET_KEYS,
    AlgoOverride,
    AlgoSpec,
    PresetConfig,
    PresetValidationError,
    describe_algo,
    list_algorithms,
)

__all__ = [
    "ALGO_REGISTRY",
    "VALID_PRESET_KEYS",
    "AlgoOverride",
    "AlgoSpec",
    "PresetConfig",
    "PresetValidationError",
    "describe_algo",
    "list_algorithms",
]
