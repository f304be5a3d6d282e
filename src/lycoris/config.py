"""Built-in presets."""

from lycoris.dropin.presets import PRESET, list_builtin_presets

__all__ = ["PRESET", "list_builtin_presets"]
