"""Text, JSON and TOML that users and other programs wrote."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lycoris.errors import ConfigError

_MARKS: Mapping[bytes, str] = {
    # UTF-32's mark begins like that of UTF-16.
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or is JSON of another type.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if isinstance(found, dict):
        return found
    raise ValueError(f"it is {type(found).__name__}, not an object by name")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file in UTF-8, whatever the encoding of the system; a byte order mark is dropped.

    Raises:
        ConfigError: The file is missing, is a folder, cannot be read, or has another encoding, which is named.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; expected a file") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{str(path)!r:.200} cannot be read: {why}") from None
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    if encoding is not None:
        raise ConfigError(f"{path} is encoded as {encoding}; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in content:
            raise ConfigError(f"{path} is not text; expected a text file in UTF-8") from None
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} is not encoded as UTF-8 (line {line}); save it as UTF-8") from None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        ConfigError: The file cannot be read (see `read_text`), is not JSON (with line and column), is JSON but not an
            object, or has an object with the same key twice.
    """
    return _object(path, read_text(path), _json)


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the TOML document in a file.

    Raises:
        ConfigError: As for `read_json`. Python 3.10 needs the package tomli.
    """
    return _object(path, read_text(path), _toml)


def _object(path: str | os.PathLike[str], text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    kind = parse.__name__.strip("_").upper()
    if not text.strip():
        raise ConfigError(f"{path} is empty; expected {'an object, {...}, in JSON' if kind == 'JSON' else kind}")
    try:
        value = parse(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {_explain_json_error(error, text)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with thousands of digits
        raise ConfigError(f"{path} cannot be read as {kind}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}; expected an object, {{...}}")
    return value


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_repeats)


def _toml(text: str) -> Any:
    if sys.version_info < (3, 11):
        try:
            import tomli as reader
        except ImportError:
            raise ConfigError("this Python reads TOML with the package tomli; install it, or write JSON") from None
    else:
        import tomllib as reader
    return reader.loads(text)


def _explain_json_error(error: json.JSONDecodeError, text: str) -> str:
    """What is wrong and where; of a comma too many, the place of the comma."""
    where = f"{error.msg} at line {error.lineno}, column {error.colno}"
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()[:2]
    if before.endswith(",") and after[:1] in ("}", "]"):
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n") - 1
        return f"{where}; the comma at line {line}, column {column} is one too many"
    return f"{where}; JSON has no comments" if after.startswith(("//", "/*", "#")) else where


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    if repeated:
        more = "" if len(repeated) == 1 else f", and so do {len(repeated) - 1} others: {', '.join(repeated[1:6])}"
        raise ConfigError(f"the key {repeated[0]!r} appears twice in one object{more}")
    return dict(pairs)
