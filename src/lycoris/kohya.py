"""The interface that sd-scripts, and trainers like it, import."""

from lycoris.dropin.kohya import create_network, create_network_from_weights
from lycoris.dropin.kohya_network import LycorisNetworkKohya
from lycoris.dropin.modules import LoConModule
from lycoris.dropin.network import LycorisNetwork

__all__ = ["LoConModule", "LycorisNetwork", "LycorisNetworkKohya", "create_network", "create_network_from_weights"]
