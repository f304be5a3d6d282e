"""Keywords of old interfaces: names that were replaced, and values that come as strings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lycoris.errors import ConfigError
from lycoris.json_io import read_json, read_toml
from lycoris.targeting.options import parse_number
from lycoris.targeting.preset import PRESETS_WITH_CONV
from lycoris.targeting.remarks import Remark

logger = logging.getLogger("LyCORIS")

RENAMED: Mapping[str, str] = {
    "use_cp": "use_tucker",
    "use_conv_cp": "use_tucker",
    "disable_conv_cp": "use_tucker",
    "constrain": "constraint",
}


deprecated_arg_dict = RENAMED
"""Its name in lycoris-lora."""


def rename_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under their present names; the new name wins where both are given."""
    found = {key: value for key, value in options.items() if key not in RENAMED}
    for key in options.keys() & RENAMED.keys():
        value = options[key]
        if value is not None and key.startswith("disable_"):
            value = not parse_number(value, key, bool)
        logger.warning("%s is called %s now", key, RENAMED[key])
        found.setdefault(RENAMED[key], value)
    return found


def read_preset(path: str) -> dict[str, Any]:
    """The preset in a TOML or JSON file. Raises `ConfigError` when it cannot be read."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"{path!r} is neither a built-in preset nor a file. Built in: {', '.join(sorted(PRESETS_WITH_CONV))}"
        )
    try:
        return read_json(file) if file.suffix.lower() == ".json" else read_toml(file)
    except ConfigError as error:
        raise ConfigError(f"{path} is no preset, an object with keys such as target_module: {error}") from error


def tell(remarks: Iterable[Remark], *, unmatched: bool = True) -> None:
    """Put remarks on the logger: warnings for what nobody knows, for ties, and for targets without layers if asked."""
    for remark in dict.fromkeys(remarks):
        warn = remark.kind in ("unknown", "tied") or (remark.kind == "unmatched" and unmatched)
        logger.log(logging.WARNING if warn else logging.INFO, "%s", remark)
