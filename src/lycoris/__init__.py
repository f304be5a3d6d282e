"""Adapters beyond LoRA for any PyTorch model: make, train, stack, merge, save and load them."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lycoris.compat import package

if TYPE_CHECKING:
    from lycoris.adapters.adapter_set import AdapterSet
    from lycoris.adapters.bundle import Bundle
    from lycoris.adapters.check_result import Verification
    from lycoris.adapters.debug import watch_finite
    from lycoris.adapters.verification import verify
    from lycoris.algorithms import BOFT, IA3, OFT, DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, Replace, TLoRA
    from lycoris.analysis.explain import Explanation, explain
    from lycoris.compat.create import create_lycoris, create_lycoris_from_weights
    from lycoris.compat.network import LycorisNetwork
    from lycoris.compat.timestep_masks import (
        clear_timestep_mask,
        compute_timestep_mask,
        get_timestep_mask,
        set_timestep_mask,
    )
    from lycoris.errors import AttachError, ConfigError, FileError, LycorisError, NotFiniteError, PlanError
    from lycoris.files import read, write
    from lycoris.targeting.planning import Plan, Rule, plan
    from lycoris.targeting.rank_schedule import RankSchedule

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
            "adapters.adapter_set": ("AdapterSet",),
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
            "adapters.bundle": ("Bundle",),
            "adapters.check_result": ("Verification",),
            "compat.create": ("create_lycoris", "create_lycoris_from_weights"),
            "compat.network": ("LycorisNetwork",),
            "compat.timestep_masks": (
                *("clear_timestep_mask", "compute_timestep_mask", "get_timestep_mask", "set_timestep_mask"),
            ),
            "errors": (*("AttachError", "ConfigError", "FileError", "LycorisError", "NotFiniteError", "PlanError"),),
            "analysis.explain": ("Explanation", "explain"),
            "files": ("read", "write"),
            "adapters.debug": ("watch_finite",),
            "targeting.planning": ("Plan", "Rule", "plan"),
            "targeting.rank_schedule": ("RankSchedule",),
            "adapters.verification": ("verify",),
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
    if name in package.list_names():
        return package.import_name(name)
    if name[:1].isupper() and hasattr(algorithms := import_module("lycoris.algorithms"), name):
        return getattr(algorithms, name)
    if not name.startswith("_") and find_spec(f"lycoris.{name}") is not None:
        return import_module(f"lycoris.{name}")
    raise AttributeError(f"module 'lycoris' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *package.list_names()})
