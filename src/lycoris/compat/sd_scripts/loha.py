"""LoHa as sd-scripts' `networks.loha`."""

from __future__ import annotations

from lycoris.compat.inside import make_loha
from lycoris.compat.module_classes import LohaModule
from lycoris.compat.sd_scripts.interface import SdScriptsInterface

_SD_SCRIPTS_LOHA = SdScriptsInterface("loha", LohaModule.weight_list_det, make_loha)

create_network = _SD_SCRIPTS_LOHA.create_network
create_network_from_weights = _SD_SCRIPTS_LOHA.create_network_from_weights
merge_weights_to_tensor = _SD_SCRIPTS_LOHA.merge_weights_to_tensor
