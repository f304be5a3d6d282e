"""Networks over one model, and what they are made of, by the names of lycoris-lora."""

from lycoris.dropin import modules as _modules
from lycoris.dropin.keywords import deprecated_arg_dict, logger, read_preset
from lycoris.dropin.making import create_lycoris, create_lycoris_from_weights
from lycoris.dropin.modules import *  # noqa: F403  # module classes have one list for all that export them
from lycoris.dropin.network import LycorisNetwork
from lycoris.dropin.presets import PRESET
from lycoris.dropin.sdk import VALID_PRESET_KEYS
from lycoris.dropin.values import is_supported_linear_module, is_weight_only_fp8_linear, str_bool

__all__ = [
    "PRESET",
    "VALID_PRESET_KEYS",
    "LycorisNetwork",
    "create_lycoris",
    "create_lycoris_from_weights",
    "deprecated_arg_dict",
    "is_supported_linear_module",
    "is_weight_only_fp8_linear",
    "logger",
    "read_preset",
    "str_bool",
]
__all__ += _modules.__all__
