"""The hashes that headers carry so that programs need not read whole files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

LEGACY_START, LEGACY_LENGTH = 0x100000, 0x10000


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash`, the SHA-256 of a file's bytes behind its header, and `sshs_legacy_hash`, of a part of it.

    The second depends on the header too: on what of it begins with `ss_`, which does not change later.
    """
    whole = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = int.from_bytes(whole[:8], "little") + 8
    part = whole[LEGACY_START : LEGACY_START + LEGACY_LENGTH]
    return {
        "sshs_model_hash": hashlib.sha256(whole[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(part).hexdigest()[:8],
    }
