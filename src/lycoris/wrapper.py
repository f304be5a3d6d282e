"""Networks over one model, and what they are made of, by the names of lycoris-lora."""

from lycoris.dropin.keywords import deprecated_arg_dict, logger, read_preset
from lycoris.dropin.making import create_lycoris, create_lycoris_from_weights
from lycoris.dropin.modules import (
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
    network_module_dict,
)
from lycoris.dropin.network import LycorisNetwork
from lycoris.dropin.presets import PRESET
from lycoris.dropin.sdk import VALID_PRESET_KEYS
from lycoris.dropin.values import is_supported_linear_module, is_weight_only_fp8_linear, str_bool

__all__ = [
    "PRESET",
    "VALID_PRESET_KEYS",
    "ButterflyOFTModule",
    "DiagOFTModule",
    "DyLoraModule",
    "FullModule",
    "GLoRAModule",
    "IA3Module",
    "LoConModule",
    "LohaModule",
    "LokrModule",
    "LycorisNetwork",
    "NormModule",
    "TLoraModule",
    "create_lycoris",
    "create_lycoris_from_weights",
    "deprecated_arg_dict",
    "get_module",
    "is_supported_linear_module",
    "is_weight_only_fp8_linear",
    "logger",
    "make_module",
    "network_module_dict",
    "read_preset",
    "str_bool",
]
