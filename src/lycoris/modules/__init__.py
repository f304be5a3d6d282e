"""Adapters of single layers."""

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
    "get_module",
    "make_module",
]
