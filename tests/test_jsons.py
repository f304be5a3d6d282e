"""Text files of users: any byte order mark, no other encoding than UTF-8, and mistakes with their place."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lycoris.compat.legacy_options import read_preset
from lycoris.errors import ConfigError
from lycoris.json_io import read_json, read_text, read_toml
from lycoris.training.settings import load_recipe

SOURCE = Path(__file__).parent.parent / "src" / "lycoris"
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    text = '{"a": 1}' if encoding in ("utf-16", "utf-32") else "\ufeff{}"
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    with pytest.raises(ConfigError, match=rf"a\.json is encoded as {encoding[:6].upper()}; save it as UTF-8"):
        read_json(tmp_path / "a.json")


def test_an_encoding_without_a_mark_is_told_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('{\n"a": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not encoded as UTF-8 \(line 2\)"):
        read_json(tmp_path / "a.json")


READERS: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    "json": (read_json, b'{"algo": "lora"}'),
    "toml": (read_toml, b'algo = "lora"'),
    "preset": (lambda path: read_preset(str(path)), b'target_module = ["Attention"]'),
    "recipe": (lambda path: load_recipe(path).as_dict(), b'{"algo": "lora"}'),
}


@pytest.mark.parametrize("name", READERS)
def test_a_mark_changes_nothing(name: str, tmp_path: Path) -> None:
    read, content = READERS[name]
    for file, start in (("plain", b""), ("marked", MARK)):
        (tmp_path / file).write_bytes(start + content)
    assert read(tmp_path / "marked") == read(tmp_path / "plain")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n "a": 1,\n}', "the comma at line 2, column 8 is one too many"),
        ('{"a": [1, 2, ]}', "the comma at line 1, column 12 is one too many"),
        ('{\n // why\n "a": 1}', "line 2, column 2; JSON has no comments"),
        ('{"a": 1, "a": 2, "b": 1, "b": 2}', "the key 'a' appears twice in one object, and so do 1 others: b"),
        ('{"x": {"a": 1, "a": 2}}', "the key 'a' appears twice"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("[1]", "holds a JSON list; expected an object"),
        ("[" * 10**5, "cannot be read as JSON"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_json(tmp_path / "a.json")
    assert words in str(caught.value)


def test_what_is_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x00\xff")
    for path, words in ((tmp_path / "a", "is not text"), (tmp_path, "is a folder"), (tmp_path / "b", "does not exist")):
        with pytest.raises(ConfigError, match=words):
            read_text(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text("a\0b")


def test_no_text_is_read_or_written_in_the_systems_own_encoding() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("read_text", "write_text"):
                assert "encoding" in {each.arg for each in node.keywords}, f"{path}:{node.lineno}"
