"""Adapters beyond LoRA for any PyTorch model: make, train, stack, merge, save and load them."""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from lycoris.dropin import package

if TYPE_CHECKING:
    from lycoris.adapters import AdapterSet
    from lycoris.algorithms import BOFT, IA3, OFT, DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, Replace, TLoRA
    from lycoris.bundle import Bundle
    from lycoris.checked import Verification
    from lycoris.dropin.making import create_lycoris, create_lycoris_from_weights
    from lycoris.dropin.network import LycorisNetwork
    from lycoris.dropin.tlora import (
        clear_timestep_mask,
        compute_timestep_mask,
        get_timestep_mask,
        set_timestep_mask,
    )
    from lycoris.errors import AttachError, ConfigError, FileError, LycorisError, NotFiniteError, PlanError
    from lycoris.explain import Explanation, explain
    from lycoris.files import read, write
    from lycoris.finite import watch_finite
    from lycoris.planning import Plan, Rule, plan
    from lycoris.schedule import RankSchedule
    from lycoris.verification import verify

__version__ = "5.0.0.dev0"

__all__ = [
    "BOFT",
    "IA3",
    "OFT",
    "AdapterSet",
    "AttachError",
    "Bundle",
    "ConfigError",
    "DoRA",
    "DyLoRA",
    "Explanation",
    "FileError",
    "Full",
    "GLoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LycorisError",
    "LycorisNetwork",
    "Norm",
    "NotFiniteError",
    "Plan",
    "PlanError",
    "RankSchedule",
    "Replace",
    "Rule",
    "TLoRA",
    "Verification",
    "__version__",
    "clear_timestep_mask",
    "compute_timestep_mask",
    "create_lycoris",
    "create_lycoris_from_weights",
    "explain",
    "get_timestep_mask",
    "plan",
    "read",
    "set_timestep_mask",
    "verify",
    "watch_finite",
    "write",
]

_HOMES: Mapping[str, str] = MappingProxyType(
    {
        name: home
        for home, names in {
            "adapters": ("AdapterSet",),
            "algorithms": (
                *(
                    "BOFT",
                    "IA3",
                    "OFT",
                    "DoRA",
                    "DyLoRA",
                    "Full",
                    "GLoRA",
                    "LoHa",
                    "LoKr",
                    "LoRA",
                    "Norm",
                    "Replace",
                    "TLoRA",
                ),
            ),
            "bundle": ("Bundle",),
            "checked": ("Verification",),
            "dropin.making": ("create_lycoris", "create_lycoris_from_weights"),
            "dropin.network": ("LycorisNetwork",),
            "dropin.tlora": (
                *("clear_timestep_mask", "compute_timestep_mask", "get_timestep_mask", "set_timestep_mask"),
            ),
            "errors": (*("AttachError", "ConfigError", "FileError", "LycorisError", "NotFiniteError", "PlanError"),),
            "explain": ("Explanation", "explain"),
            "files": ("read", "write"),
            "finite": ("watch_finite",),
            "planning": ("Plan", "Rule", "plan"),
            "schedule": ("RankSchedule",),
            "verification": ("verify",),
        }.items()
        for name in names
    }
)
"""Where each public name lives. It is imported at the first use, so that the command line starts without torch."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(import_module(f"lycoris.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
    if name in package.names():
        return package.find(name)
    if not name.startswith("_") and find_spec(f"lycoris.{name}") is not None:
        return import_module(f"lycoris.{name}")
    raise AttributeError(f"module 'lycoris' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *package.names()})


class _Package(ModuleType):
    """A package in which a public name wins over a submodule that is called the same, as `explain` is.

    Python binds every submodule to its package when it is imported, which may be before or after the public name's
    first use.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
