"""Adapters beyond LoRA for any PyTorch model: make, train, stack, merge, save and load them."""

from typing import TYPE_CHECKING, Any

from lycoris.adapters import AdapterSet
from lycoris.algorithms import BOFT, IA3, OFT, DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, TLoRA
from lycoris.bundle import Bundle
from lycoris.checked import Verification
from lycoris.dropin import package as _package
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


if not TYPE_CHECKING:  # a checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        return _package.find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_package.names()})
