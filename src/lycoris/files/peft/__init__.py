"""PEFT's adapter folders: `adapter_config.json` next to `adapter_model.safetensors`."""

from __future__ import annotations

from lycoris.files.peft.reading import read_peft
from lycoris.files.peft.writing import encode_lora_metadata, encode_peft, write_peft

__all__ = ["encode_lora_metadata", "encode_peft", "read_peft", "write_peft"]
