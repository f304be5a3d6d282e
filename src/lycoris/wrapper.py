"""Networks over one model and their modules, by the names of lycoris-lora."""

from lycoris.compat import module_classes as _modules
from lycoris.compat.config_sdk import VALID_PRESET_KEYS
from lycoris.compat.create import create_lycoris, create_lycoris_from_weights
from lycoris.compat.legacy_options import deprecated_arg_dict, logger, read_preset
from lycoris.compat.module_classes import *  # noqa: F403  # module classes have one list for all that export them
from lycoris.compat.network import LycorisNetwork
from lycoris.compat.presets import PRESET
from lycoris.compat.values import is_supported_linear_module, is_weight_only_fp8_linear, str_bool

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
