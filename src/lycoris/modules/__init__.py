"""Adapters of single layers."""

from lycoris.dropin.functional.layer import factorization
from lycoris.dropin.module import LycorisBaseModule
from lycoris.dropin.modules import (
    MODULE_LIST,
    ButterflyOFTModule,
    DiagOFTModule,
    DyLoraModule,
    FullModule,
    GLoRAModule,
    IA3Module,
    LoConModule,
    LohaModule,
    LokrModule,
    NormModule,
    TLoraModule,
    get_module,
    make_module,
)
from lycoris.modules import base, boft, diag_oft, dylora, full, glora, ia3, locon, loha, lokr, norms, tlora

__all__ = [
    "MODULE_LIST",
    "ButterflyOFTModule",
    "DiagOFTModule",
    "DyLoraModule",
    "FullModule",
    "GLoRAModule",
    "IA3Module",
    "LoConModule",
    "LohaModule",
    "LokrModule",
    "LycorisBaseModule",
    "NormModule",
    "TLoraModule",
    "base",
    "boft",
    "diag_oft",
    "dylora",
    "factorization",
    "full",
    "get_module",
    "glora",
    "ia3",
    "locon",
    "loha",
    "lokr",
    "make_module",
    "norms",
    "tlora",
]
