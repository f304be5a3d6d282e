"""Writing adapter files: folders, rights, what a header has no room for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from test_files import Model, adapted
from torch import nn

from lycoris import (
    FileError,
    LoRA,
    read,
    write,
)
from lycoris.files import read_header


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that this user cannot write to")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        write(adapted(Model()).bundle(), tmp_path / "closed" / "a.safetensors")
    assert not list((tmp_path / "closed").iterdir())


def test_saving_makes_folders_and_replaces_files_with_the_usual_rights(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    for _ in range(2):
        write(adapted(Model()).bundle(), path)
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


def test_metadata_that_a_header_has_no_room_for_are_left_out_with_a_warning(tmp_path: Path, caplog: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    bundle = adapted(model, LoRA(rank=2)).bundle()
    given = {"ss_tag_frequency": "x" * 120_000_000, "ss_other": "y" * 1000}
    made = write(bundle, tmp_path / "a.safetensors", metadata=given)
    assert "ss_tag_frequency" in caplog.text
    assert "120.0 MB" in caplog.text
    assert "100 MB" in caplog.text
    found = read_header(tmp_path / "a.safetensors").metadata
    assert "ss_tag_frequency" not in found.keys() | made.header.keys()
    assert found["ss_other"] == given["ss_other"]
    assert read(tmp_path / "a.safetensors", model).report.clean


def test_writing_over_may_be_refused(tmp_path: Path) -> None:
    bundle = adapted(nn.Sequential(nn.Linear(8, 8)), LoRA(rank=2)).bundle()
    path = tmp_path / "a.safetensors"
    write(bundle, path, overwrite=False)
    write(bundle, path)
    with pytest.raises(FileError, match="exists; name another"):
        write(bundle, path, overwrite=False)
