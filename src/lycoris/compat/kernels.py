"""The choice between kernels, of which there is one here: plain torch, the same on every device."""

from __future__ import annotations

import logging
import os
from typing import Any

logger = logging.getLogger("LyCORIS")

ONLY = "torch"
VARIABLE = "LYCORIS_KERNEL_BACKEND"
"""The environment variable that names a backend in lycoris-lora."""


def available_backends(device: Any = None) -> tuple[str, ...]:
    """The backends that can be asked for."""
    return (ONLY,)


def fused_backends(device: Any = None) -> tuple[str, ...]:
    """Those with kernels of their own: none."""
    return ()


def resolve_backend(requested: str | None = None, device: Any = None) -> str:
    """The backend that is used. Raises `RuntimeError` for a name other than "torch" and "auto"."""
    wanted = (requested or os.environ.get(VARIABLE, "auto")).lower()
    if wanted not in ("auto", ONLY):
        raise RuntimeError(f"there is no kernel backend {wanted!r} here, only {ONLY!r}")
    return ONLY


def set_tuning(enabled: bool | None) -> bool | None:
    """Whether kernels are timed: there are none, so that True is reported; returns what was in force, False."""
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(f"set_tuning takes True, False or None, not {enabled!r}")
    if enabled:
        logger.info("set_tuning(True) has no effect: there are no kernels to time")
    return False


def tuning_enabled() -> bool:
    """Whether kernels are timed: no."""
    return False
