"""The version of the file format, which a file's header names."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lycoris.errors import FileError

FORMAT_KEY = "lycoris_format"
"""Header key of the version."""
FORMAT_VERSION = 1
"""The version that is written. It grows when an older release would read a file wrongly; see `docs/stability.md`."""


def check_format(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Check that this release can read a file's version of the format; files without one are accepted.

    Args:
        metadata: of the file's header.
        path: for the error.

    Raises:
        FileError: the version is a later one, or no whole number.
    """
    version = metadata.get(FORMAT_KEY, str(FORMAT_VERSION))
    if not (version.isascii() and version.isdecimal()) or int(version) > FORMAT_VERSION:
        raise FileError(
            f"{path} says that it has version {version:.20} of LyCORIS' file format, and this release reads up to "
            f"{FORMAT_VERSION}: install a newer lycoris, or convert the file there with `lycoris convert --to kohya`"
        )
