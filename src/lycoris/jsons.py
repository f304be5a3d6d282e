"""JSON from strangers."""

from __future__ import annotations

import json
from typing import Any


def json_object(text: str) -> dict[str, Any]:
    """The object that a text is as JSON. Raises `ValueError` for every other text, nested too deep ones included."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if isinstance(found, dict):
        return found
    raise ValueError(f"it is {type(found).__name__}, not an object by name")
