"""Hashes in a file's header, by which programs identify a model without reading the whole file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

LEGACY_START, LEGACY_LENGTH = 0x100000, 0x10000


def compute_model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the two hashes of a file by their header names.

    `sshs_model_hash` is the SHA-256 of the bytes after the header. `sshs_legacy_hash` is computed from 64 KiB at offset
    1 MiB of the file, so it also depends on the header entries that begin with `ss_`.
    """
    content = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = int.from_bytes(content[:8], "little") + 8
    part = content[LEGACY_START : LEGACY_START + LEGACY_LENGTH]
    return {
        "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(part).hexdigest()[:8],
    }
