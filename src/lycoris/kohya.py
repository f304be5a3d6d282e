"""The interface that sd-scripts, and trainers like it, import."""

from lycoris.dropin.keywords import deprecated_arg_dict, logger, read_preset
from lycoris.dropin.kohya import create_network, create_network_from_weights
from lycoris.dropin.kohya_network import LycorisNetworkKohya
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
from lycoris.dropin.values import is_supported_linear_module, precalculate_safetensors_hashes, str_bool

__all__ = [
    "PRESET",
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
    "LycorisNetworkKohya",
    "NormModule",
    "TLoraModule",
    "create_network",
    "create_network_from_weights",
    "deprecated_arg_dict",
    "get_module",
    "is_supported_linear_module",
    "logger",
    "make_module",
    "network_module_dict",
    "precalculate_safetensors_hashes",
    "read_preset",
    "str_bool",
]
