"""What scripts find in the package `lycoris` beside its own names: imported when it is asked for, to start fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "lycoris.modules": (
        *("DiagOFTModule", "DyLoraModule", "FullModule", "GLoRAModule", "LoConModule", "LohaModule", "LokrModule"),
        *("ButterflyOFTModule", "IA3Module", "NormModule", "TLoraModule", "get_module", "make_module"),
    ),
    "lycoris.config": ("list_builtin_presets",),
    "lycoris.config_sdk": (
        *("AlgoOverride", "PresetConfig", "PresetValidationError", "describe_algo", "list_algorithms"),
    ),
    "lycoris.logging": ("logger",),
}
"""Module → names of it that the package has too."""

MODULES = ("config", "config_sdk", "functional", "kernels", "kohya", "logging", "modules", "utils", "wrapper")
"""Modules that the package has as attributes without being asked to import them."""


def find(name: str) -> Any:
    """One of these by its name. Raises `AttributeError` for another."""
    if name in MODULES:
        return import_module(f"lycoris.{name}")
    module = next((module for module, names in ELSEWHERE.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'lycoris' has no attribute {name!r}")
    return getattr(import_module(module), name)


def names() -> Iterator[str]:
    """All of them."""
    yield from MODULES
    for names in ELSEWHERE.values():
        yield from names
