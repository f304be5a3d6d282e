"""Decide whether a file or folder may be overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lycoris.errors import FileError
from lycoris.files.container.kinds import CONFIG, PICKLE, WEIGHTS


def check_target(target: str | os.PathLike[str], sources: Iterable[Path] = (), *, overwrite: bool) -> None:
    """Raise `FileError` where writing to `target` would replace something it must not.

    Args:
        target: A file, or a PEFT folder.
        sources: Files that are being read, which may never be replaced, not even through links.
        overwrite: Whether other existing files may be.
    """
    path = Path(target)
    written = _list_paths(path)
    for source in sources:
        if any(_is_same_file(one, other) for one in _list_paths(source) for other in written):
            raise FileError(f"{target} is read here, and the input is never the output; name another")
    # These answer for names that no file can have; writing says why.
    candidates = written[1:] if os.path.isdir(path) else written[:1]  # noqa: PTH112 -- Path.is_dir raises for them
    there = next((each for each in candidates if os.path.exists(each)), None)  # noqa: PTH110 -- likewise
    if there is not None and not overwrite:
        raise FileError(f"{there} exists; name another, or overwrite it (--force, in Python overwrite=True)")


def _list_paths(path: Path) -> tuple[Path, ...]:
    """A path, and the files that it holds as a PEFT folder."""
    return path, path / WEIGHTS, path / CONFIG, path / PICKLE


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False
