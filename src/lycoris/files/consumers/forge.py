"""Forge (2025), whose rules are ComfyUI's without rotations."""

from __future__ import annotations

from lycoris.files.consumers import keys
from lycoris.files.consumers.comfyui import FAILING, KRON, REPLACED, SHARED, STOPPED
from lycoris.files.consumers.consumer import Consumer, Row
from lycoris.files.consumers.traits import core_without_contiguous, is_a

UNMATCHED = 12
"""More keys than these in a file that nothing takes, and it rejects the file."""

FORGE = Consumer(
    "forge",
    "Forge",
    keys.FORGE,
    (
        REPLACED,
        Row(
            is_a("diag-oft", "boft"),
            "not at all",
            "knows no rotations, and passes their keys over",
            "plain",
        ),
        *STOPPED,
        Row(core_without_contiguous, "not at all", f"{KRON}, and stops", "flat w2", stops=True),
        *(row._replace(stops=True) if row in FAILING else row for row in SHARED),
    ),
    kinds=("linear", "conv", "norm", "embedding", "parameter"),
    replaces=True,
    unmatched=UNMATCHED,
    own="comfyui",
)
