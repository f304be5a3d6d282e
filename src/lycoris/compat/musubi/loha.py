"""LoHa as Musubi Tuner's `networks.loha`."""

from __future__ import annotations

from lycoris.compat.inside import make_loha
from lycoris.compat.module_classes import LohaModule
from lycoris.compat.musubi.interface import MusubiInterface

_MUSUBI_LOHA = MusubiInterface("loha", LohaModule.weight_list_det, make_loha)

create_arch_network = _MUSUBI_LOHA.create_arch_network
create_network = _MUSUBI_LOHA.create_network
create_arch_network_from_weights = _MUSUBI_LOHA.create_arch_network_from_weights
create_network_from_weights = _MUSUBI_LOHA.create_network_from_weights
merge_weights_to_tensor = _MUSUBI_LOHA.merge_weights_to_tensor
