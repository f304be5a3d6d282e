"""Kernel backends, of which there is one: PyTorch, which a compiler may fuse."""

from lycoris.compat.kernels import available_backends, fused_backends, resolve_backend, set_tuning, tuning_enabled

__all__ = [
    "available_backends",
    "fused_backends",
    "resolve_backend",
    "set_tuning",
    "tuning_enabled",
]
