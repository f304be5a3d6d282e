"""Write the two files of a PEFT folder, both or neither."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lycoris.errors import FileError
from lycoris.files.container.kinds import CONFIG, WEIGHTS
from lycoris.files.container.storage import save_tensors


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: str) -> None:
    """Write tensors and config into a PEFT folder, both or neither.

    A new folder is written under a temporary name and moved; in an existing one both files are replaced, and restored
    if that fails.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; give a folder")
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        save_tensors(tensors, made / WEIGHTS, {})
        (made / CONFIG).write_text(config, encoding="utf-8")
        if folder.exists():
            _replace_files(made, folder)
        else:
            mask = os.umask(0)
            os.umask(mask)
            made.chmod(0o777 & ~mask)
            made.replace(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _replace_files(made: Path, folder: Path) -> None:
    before = {name: made / f"{name}.before" for name in (WEIGHTS, CONFIG) if (folder / name).exists()}
    for name, kept in before.items():
        shutil.copy2(folder / name, kept)
    try:
        for name in (WEIGHTS, CONFIG):
            (made / name).replace(folder / name)
    except OSError:
        for name in (WEIGHTS, CONFIG):
            if name in before:
                before[name].replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
