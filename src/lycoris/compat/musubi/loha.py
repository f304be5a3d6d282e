"""LoHa as Musubi Tuner's `networks.loha`."""

from __future__ import annotations

from lycoris.compat.inside import make_loha
from lycoris.compat.module_classes import LohaModule
from lycoris.compat.musubi.interface import Interface

_OWN = Interface("loha", LohaModule.weight_list_det, make_loha)

create_arch_network = _OWN.create_arch_network
create_network = _OWN.create_network
create_arch_network_from_weights = _OWN.create_arch_network_from_weights
create_network_from_weights = _OWN.create_network_from_weights
merge_weights_to_tensor = _OWN.merge_weights_to_tensor
