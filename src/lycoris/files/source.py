"""The one way in to an adapter file: its tensors and its header, with its path before every error about them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from lycoris.errors import FileError, prefix_errors
from lycoris.files.container.storage import load_tensors
from lycoris.files.dialects.scales import read_adjacent_config


class FileContent(NamedTuple):
    """What an adapter file holds.

    Without a file, where the tensors were given, the header is empty.
    """

    tensors: dict[str, Tensor]
    header: dict[str, str]
    """Its metadata, and the config that is next to the file, which may have the scale."""


@contextmanager
def open_source(
    path: str | os.PathLike[str] | None, tensors: Mapping[str, Tensor] | None = None
) -> Iterator[FileContent]:
    """Open an adapter file; errors raised inside the `with` block begin with its path.

    Args:
        path: The file. With `tensors` it is only a name for them in errors, and may be None.
        tensors: Its tensors, where the caller has read them already; there is no header then.

    Raises:
        FileError: The file cannot be read, or neither a file nor tensors were given.
    """
    if tensors is not None:
        source = FileContent(dict(tensors), {})
    elif path is not None:
        # Errors about the bytes of a file name it themselves.
        found, header = load_tensors(path)
        source = FileContent(found, {**read_adjacent_config(path), **header})
    else:
        raise FileError("neither a file nor weights_sd was given")
    with prefix_errors(path):
        yield source
