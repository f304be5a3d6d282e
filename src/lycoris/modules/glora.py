"""GLoRA."""

from lycoris.dropin.modules import GLoRAModule

__all__ = ["GLoRAModule"]
