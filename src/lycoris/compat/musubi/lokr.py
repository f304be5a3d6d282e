"""LoKr as Musubi Tuner's `networks.lokr`; `factor` is the wanted size of the smaller factors."""

from __future__ import annotations

from lycoris.compat.inside import make_lokr
from lycoris.compat.module_classes import LokrModule
from lycoris.compat.musubi.interface import MusubiInterface

_MUSUBI_LOKR = MusubiInterface("lokr", LokrModule.weight_list_det, make_lokr, ("factor",))

create_arch_network = _MUSUBI_LOKR.create_arch_network
create_network = _MUSUBI_LOKR.create_network
create_arch_network_from_weights = _MUSUBI_LOKR.create_arch_network_from_weights
create_network_from_weights = _MUSUBI_LOKR.create_network_from_weights
merge_weights_to_tensor = _MUSUBI_LOKR.merge_weights_to_tensor
