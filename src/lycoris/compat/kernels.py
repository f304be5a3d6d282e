"""The choice of a kernel backend, of which there is one: PyTorch, on every device."""

from __future__ import annotations

import logging
import os
from typing import Any

logger = logging.getLogger("LyCORIS")

BACKEND = "torch"
BACKEND_VARIABLE = "LYCORIS_KERNEL_BACKEND"
"""Environment variable with the name of a backend."""


def available_backends(device: Any = None) -> tuple[str, ...]:
    """Return the backends that can be requested: "torch"."""
    return (BACKEND,)


def fused_backends(device: Any = None) -> tuple[str, ...]:
    """Return the backends with fused kernels: none."""
    return ()


def resolve_backend(requested: str | None = None, device: Any = None) -> str:
    """Return the backend that is used: "torch".

    `requested` None reads the environment variable LYCORIS_KERNEL_BACKEND. Raises `RuntimeError` for a name other than
    "torch" and "auto".
    """
    wanted = (requested or os.environ.get(BACKEND_VARIABLE, "auto")).lower()
    if wanted not in ("auto", BACKEND):
        raise RuntimeError(f"there is no kernel backend {wanted!r}; the only one is {BACKEND!r}")
    return BACKEND


def set_tuning(enabled: bool | None) -> bool | None:
    """Turn timing of kernels on or off, which has no effect here.

    Returns the setting from before, always False. True is logged; raises `TypeError` for what is not a bool or None.
    """
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(f"set_tuning takes True, False or None, not {enabled!r}")
    if enabled:
        logger.info("set_tuning(True) has no effect: there are no kernels to time")
    return False


def tuning_enabled() -> bool:
    """Return whether kernels are timed: never."""
    return False
