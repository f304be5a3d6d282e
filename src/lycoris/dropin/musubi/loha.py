"""LoHa as Musubi Tuner's `networks.loha`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lycoris.algorithms import LoHa
from lycoris.dropin.modules import LohaModule
from lycoris.dropin.musubi.interface import Interface


def _make(options: Mapping[str, Any], **settings: Any) -> LoHa:
    return LoHa(**settings)


_OWN = Interface("loha", LohaModule.weight_list_det, _make)

create_arch_network = _OWN.create_arch_network
create_network = _OWN.create_network
create_arch_network_from_weights = _OWN.create_arch_network_from_weights
create_network_from_weights = _OWN.create_network_from_weights
merge_weights_to_tensor = _OWN.merge_weights_to_tensor
