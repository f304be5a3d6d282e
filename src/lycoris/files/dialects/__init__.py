"""How file formats write the path of a layer, one table each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lycoris.files.dialect import Dialect
from lycoris.files.dialects.kohya import KOHYA
from lycoris.files.dialects.lycoris import LYCORIS

DIALECTS: Mapping[str, Dialect] = MappingProxyType({dialect.name: dialect for dialect in (LYCORIS, KOHYA)})
"""By name, in the order in which a file is compared with them."""
