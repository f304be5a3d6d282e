"""The interface that sd-scripts, and trainers like it, import."""

from lycoris.compat import module_classes as _modules
from lycoris.compat.kohya import create_network, create_network_from_weights
from lycoris.compat.kohya_network import LycorisNetworkKohya
from lycoris.compat.legacy_options import deprecated_arg_dict, logger, read_preset
from lycoris.compat.module_classes import *  # noqa: F403  # module classes have one list for all that export them
from lycoris.compat.network import LycorisNetwork
from lycoris.compat.presets import PRESET
from lycoris.compat.values import is_supported_linear_module, precalculate_safetensors_hashes, str_bool

__all__ = [
    "PRESET",
    "LycorisNetwork",
    "LycorisNetworkKohya",
    "create_network",
    "create_network_from_weights",
    "deprecated_arg_dict",
    "is_supported_linear_module",
    "logger",
    "precalculate_safetensors_hashes",
    "read_preset",
    "str_bool",
]
__all__ += _modules.__all__
