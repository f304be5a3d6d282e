"""Files of every release are read for ever, and do what they did."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tools.fixtures import FOLDER, build_model, changes

from cases import relative
from lycoris import FileError, read
from lycoris.files import detect
from lycoris.files.container import format_version
from tools import fixtures

RELEASES = sorted(FOLDER.glob("*.tar.xz"))
EXACT = 1e-5
"""Alpha, and what half of the files were trained with, is stored in single precision."""


@pytest.fixture(scope="module", params=RELEASES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_there_are_files_of_this_release() -> None:
    assert RELEASES


def test_every_file_is_read_and_does_what_it_did(release: Path) -> None:
    model, expected = build_model(), load_file(release / "expected.safetensors")
    dialects = [path for path in release.iterdir() if path.is_dir()]
    assert len(dialects) > 10
    for dialect in dialects:
        for path in dialect.iterdir():
            found = changes(model, read(path, model))
            assert found, path
            for layer, change in found.items():
                wanted = expected[f"{path.name.removesuffix('.safetensors')}:{layer}"].double()
                assert relative(change, wanted) < EXACT or (not wanted.any() and not change.any()), (path, layer)


def test_every_layer_is_in_some_file(release: Path) -> None:
    names = {key.split(":")[0] for key in load_file(release / "expected.safetensors")}
    assert {path.stem for path in (release / "lycoris").iterdir()} == names


def test_a_later_format_is_refused_by_its_number(release: Path, tmp_path: Path) -> None:
    source = release / "lycoris" / "lora.safetensors"
    with safe_open(source, framework="pt") as file:
        header = dict(file.metadata())
    assert header[format_version.FORMAT_KEY] == str(format_version.FORMAT_VERSION)
    save_file(load_file(source), tmp_path / "new.safetensors", header | {format_version.FORMAT_KEY: "2"})
    for reader in (detect, lambda path: read(path, build_model())):
        with pytest.raises(FileError, match=r"has version 2 of LyCORIS' file format, and this release reads up to 1"):
            reader(tmp_path / "new.safetensors")


def test_the_tool_writes_every_format_and_never_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixtures, "FOLDER", tmp_path)
    monkeypatch.setattr(fixtures, "settings", lambda: iter(["lora"]))
    fixtures.main()
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        names = set(archive.getnames())
    assert {"expected.safetensors", "lycoris/lora.safetensors", "peft/lora/adapter_config.json"} <= names
    with pytest.raises(SystemExit, match="never written again"):
        fixtures.main()
