"""LoRA and LoCon."""

from lycoris.dropin.modules import LoConModule

__all__ = ["LoConModule"]
