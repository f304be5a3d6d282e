"""The interface that sd-scripts, and trainers like it, import."""

from lycoris.dropin import modules as _modules
from lycoris.dropin.keywords import deprecated_arg_dict, logger, read_preset
from lycoris.dropin.kohya import create_network, create_network_from_weights
from lycoris.dropin.kohya_network import LycorisNetworkKohya
from lycoris.dropin.modules import *  # noqa: F403  # module classes have one list for all that export them
from lycoris.dropin.network import LycorisNetwork
from lycoris.dropin.presets import PRESET
from lycoris.dropin.values import is_supported_linear_module, precalculate_safetensors_hashes, str_bool

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
