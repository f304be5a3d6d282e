"""PEFT's adapter folders: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

from lycoris.files.peft.reading import read_peft
from lycoris.files.peft.writing import encode_peft, lora_adapter_metadata, write_peft

__all__ = ["encode_peft", "lora_adapter_metadata", "read_peft", "write_peft"]
