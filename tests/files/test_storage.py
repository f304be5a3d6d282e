"""Tensors in files, files that are something else, and what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from storing import TENSORS, entry, poor, put, raw, refused
from torch import Tensor

from lycoris import FileError
from lycoris.files import load_tensors, read_header, save_tensors
from lycoris.files.container.headers import DTYPES


def test_some_of_the_tensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert load_tensors(tmp_path / name, lambda key: key == "b")[0].keys() == {"b"}


def test_tensors_lie_in_the_file_and_stay_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.ones(1000), "b": torch.ones(1000)}, path, {})
    tensors, _ = load_tensors(path)
    assert tensors["b"].data_ptr() - tensors["a"].data_ptr() == 4000
    save_tensors({key: tensor * 2 for key, tensor in tensors.items()}, path, {})
    assert tensors["a"].sum() == 1000
    assert load_tensors(path)[0]["a"].sum() == 2000


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "C64"])
def test_tensors_at_odd_places_are_copied_to_even_ones(dtype: str, tmp_path: Path) -> None:
    values = torch.arange(300).to(DTYPES[dtype])
    data = values.view(torch.uint8).numpy().tobytes()
    for pad in range(8):
        head = json.dumps({"a": entry(dtype, [300], [0, len(data)])}).encode() + b" " * pad
        found = load_tensors(put(tmp_path, raw(head, data), f"{pad}.safetensors"))[0]["a"]
        assert found.data_ptr() % found.element_size() == 0
        assert torch.equal(found, values)


# -- other files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x"])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b"GGUF\3\0\0\0" + bytes(40), "GGUF"),
        (b"", "it is empty"),
    ],
)
def test_what_failed_downloads_leave(content: bytes, word: str, name: str, tmp_path: Path) -> None:
    refused(put(tmp_path, content, name), word)


@pytest.mark.parametrize("content", [b"Entry not found", b'{"error":"Repository not found"}\n'])
def test_text(content: bytes, tmp_path: Path) -> None:
    refused(put(tmp_path, content), "it is text that begins", content[:10].decode())


@pytest.mark.skipif(os.name == "nt", reason="pipes are files of POSIX systems")
def test_what_is_no_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "good.safetensors")
    refused(tmp_path, "is a folder", "good.safetensors")
    refused(tmp_path / "goood.safetensors", "there is no file", "good.safetensors")
    refused(tmp_path / "good.safetensors" / "x", "there is no file")
    refused(tmp_path / ("x" * 5000), "cannot be opened")
    refused(tmp_path / "a\0b", "there is no file")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "a device or a pipe")


def test_a_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, raw({}))

    def closed(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)
    refused(path, "cannot be opened", "Permission denied")


def test_names_that_say_something_else(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS, tmp_path / "b.safetensors", _use_new_zipfile_serialization=False)
    refused(tmp_path / "a.safetensors", "is a pickle")
    refused(tmp_path / "b.safetensors", "is a pickle")
    poor(tmp_path / "b.safetensors", r"rename it to b\.pt")
    save_file(TENSORS, tmp_path / "a.PT")
    with pytest.raises(FileError, match=r"a\.PT is a safetensors file .* rename it to a\.safetensors"):
        load_tensors(tmp_path / "a.PT")
    assert read_header(tmp_path / "a.PT").tensors.keys() == TENSORS.keys()


# -- writing -----------------------------------------------------------------------------------------------------------


def test_every_tensor_is_written_as_it_looks(tmp_path: Path) -> None:
    path, base = tmp_path / "a.safetensors", torch.arange(24.0).reshape(4, 6)
    tensors: dict[str, Tensor] = {
        "base": base,
        "same": base,
        "view": base[1:3],
        "overlap": base[2:],
        "turned": base.T,
        "strided": base[:, ::2],
        "expanded": base[:1].expand(5, 6),
        "parameter": torch.nn.Parameter(base * 2),
        "conjugate": torch.complex(base, base).conj(),
        "negative": torch.complex(base, base).conj().imag,
        "last": torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(3, 0),
    }
    save_tensors(tensors, path, {"k": "v"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key], tensor), key
    assert read_header(path).metadata == {"format": "pt", "k": "v"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "word"),
    [
        ({"w": torch.ones(2)}, {"steps": 10}, r"metadata 'steps' is 10, a int.*str\(value\)"),
        ({"w": torch.ones(2)}, {"steps": None}, "metadata 'steps' is None"),
        ({"w": torch.ones(2)}, {3: "x"}, "metadata 3 is 'x'"),
        ({"w": torch.ones(2)}, {"k": "\ud800"}, "metadata 'k' holds half a character"),
        ({"w": torch.ones(2, device="meta")}, {}, "w is on the meta device"),
        ({"w": torch.eye(2).to_sparse()}, {}, r"w is torch.sparse_coo.*to_dense"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, {}, "w is of torch.complex128.*known are bool"),
        ({"w": 3}, {}, "w is a int, no tensor"),
        ({3: torch.ones(2)}, {}, "3 cannot be the name"),
        ({"__metadata__": torch.ones(2)}, {}, "__metadata__' cannot be the name"),
        ({"\udfff": torch.ones(2)}, {}, "cannot be the name"),
    ],
)
def test_what_cannot_be_written(tensors: Any, metadata: Any, word: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"before")
    with pytest.raises(FileError, match=f"(?s){word}.*a.safetensors was not written"):
        save_tensors(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(FileError):
        save_tensors(tensors, tmp_path / "new" / "a.safetensors", metadata)
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == b"before"
