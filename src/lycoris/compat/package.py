"""Names that scripts find in the package `lycoris` in addition to its own, imported on demand to keep startup fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

NAMES_BY_MODULE: Mapping[str, tuple[str, ...]] = {
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
"""Module → names in it that the package has as well."""

LAZY_MODULES = ("config", "config_sdk", "functional", "kernels", "kohya", "logging", "modules", "utils", "wrapper")
"""Modules that are attributes of the package without an import statement."""


def import_name(name: str) -> Any:
    """Return an attribute of the package that lives in another module, importing that module.

    Raises `AttributeError` for an unknown name.
    """
    if name in LAZY_MODULES:
        return import_module(f"lycoris.{name}")
    module = next((module for module, names in NAMES_BY_MODULE.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'lycoris' has no attribute {name!r}")
    return getattr(import_module(module), name)


def list_names() -> Iterator[str]:
    """Yield all of these names, without importing anything."""
    yield from LAZY_MODULES
    for names in NAMES_BY_MODULE.values():
        yield from names
