"""DyLoRA."""

from lycoris.dropin.modules import DyLoraModule

__all__ = ["DyLoraModule"]
