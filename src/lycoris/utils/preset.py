"""Presets from files."""

from lycoris.compat.config_sdk import PresetConfig, PresetValidationError
from lycoris.compat.legacy_options import read_preset

__all__ = [
    "PresetConfig",
    "PresetValidationError",
    "read_preset",
]
