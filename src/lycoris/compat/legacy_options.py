"""Options of old interfaces: renamed keywords, and values given as strings."""

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

RENAMED_OPTIONS: Mapping[str, str] = {
    "use_cp": "use_tucker",
    "use_conv_cp": "use_tucker",
    "disable_conv_cp": "use_tucker",
    "constrain": "constraint",
}


deprecated_arg_dict = RENAMED_OPTIONS
"""Name of this table in lycoris-lora."""


def rename_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with deprecated names replaced by present ones, with a warning for each.

    The present name takes precedence where both are given. Values of `disable_` options are inverted.
    """
    found = {key: value for key, value in options.items() if key not in RENAMED_OPTIONS}
    for key in options.keys() & RENAMED_OPTIONS.keys():
        value = options[key]
        if value is not None and key.startswith("disable_"):
            value = not parse_number(value, key, bool)
        logger.warning("%s is deprecated; use %s", key, RENAMED_OPTIONS[key])
        found.setdefault(RENAMED_OPTIONS[key], value)
    return found


def read_preset(path: str) -> dict[str, Any]:
    """Return the preset in a TOML or JSON file, as a dict.

    Raises `ConfigError` when there is no such file, or when it cannot be parsed.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"{path!r} is neither a built-in preset nor a file. Built-in: {', '.join(sorted(PRESETS_WITH_CONV))}"
        )
    try:
        return read_json(file) if file.suffix.lower() == ".json" else read_toml(file)
    except ConfigError as error:
        raise ConfigError(
            f"{path} is not a preset, which is an object with keys such as target_module: {error}"
        ) from error


def log_remarks(remarks: Iterable[Remark], *, unmatched: bool = True) -> None:
    """Log remarks, each once.

    Unknown options and tied weights are warnings, and so are targets without layers if `unmatched`; the others are at
    level INFO.
    """
    for remark in dict.fromkeys(remarks):
        warn = remark.kind in ("unknown", "tied") or (remark.kind == "unmatched" and unmatched)
        logger.log(logging.WARNING if warn else logging.INFO, "%s", remark)
