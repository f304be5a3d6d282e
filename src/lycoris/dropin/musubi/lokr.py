"""LoKr as Musubi Tuner's `networks.lokr`; `factor` is the wanted size of the smaller factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lycoris.algorithms import LoKr
from lycoris.dropin.modules import LokrModule
from lycoris.dropin.musubi.interface import Interface
from lycoris.options import parse_number


def _make(options: Mapping[str, Any], **settings: Any) -> LoKr:
    return LoKr(factor=parse_number(options.get("factor", -1), "factor", int), **settings)


_OWN = Interface("lokr", LokrModule.weight_list_det, _make, ("factor",))

create_arch_network = _OWN.create_arch_network
create_network = _OWN.create_network
create_arch_network_from_weights = _OWN.create_arch_network_from_weights
create_network_from_weights = _OWN.create_network_from_weights
merge_weights_to_tensor = _OWN.merge_weights_to_tensor
