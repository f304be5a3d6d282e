"""LoKr as sd-scripts' `networks.lokr`; `factor` is the wanted size of the smaller factors."""

from __future__ import annotations

from lycoris.compat.inside import make_lokr
from lycoris.compat.module_classes import LokrModule
from lycoris.compat.sd_scripts.interface import SdScriptsInterface

_SD_SCRIPTS_LOKR = SdScriptsInterface("lokr", LokrModule.weight_list_det, make_lokr, ("factor",))

create_network = _SD_SCRIPTS_LOKR.create_network
create_network_from_weights = _SD_SCRIPTS_LOKR.create_network_from_weights
merge_weights_to_tensor = _SD_SCRIPTS_LOKR.merge_weights_to_tensor
