"""Presets from files."""

from lycoris.dropin.keywords import read_preset
from lycoris.dropin.sdk import PresetConfig, PresetValidationError

__all__ = [
    "PresetConfig",
    "PresetValidationError",
    "read_preset",
]
