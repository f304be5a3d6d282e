"""The algorithms: what an adapter computes. One file each, and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.boft import BOFT as BOFT
from lycoris.algorithms.dora import DoRA as DoRA
from lycoris.algorithms.dylora import DyLoRA as DyLoRA
from lycoris.algorithms.full import Full as Full
from lycoris.algorithms.glora import GLoRA as GLoRA
from lycoris.algorithms.ia3 import IA3 as IA3
from lycoris.algorithms.loha import LoHa as LoHa
from lycoris.algorithms.lokr import LoKr as LoKr
from lycoris.algorithms.lora import LoRA as LoRA
from lycoris.algorithms.norm import Norm as Norm
from lycoris.algorithms.oft import OFT as OFT
from lycoris.algorithms.replacement import Replace as Replace
from lycoris.algorithms.tlora import TLoRA as TLoRA

ALGORITHMS: Mapping[str, type[Algorithm]] = MappingProxyType(
    {
        each.name: each
        for each in list(globals().values())
        if isinstance(each, type) and issubclass(each, Algorithm) and each is not Algorithm
    }
)
"""Name → class, of every class imported above."""
