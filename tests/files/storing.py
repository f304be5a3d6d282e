"""Files byte by byte, and how their refusal reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lycoris import FileError
from lycoris.files import load_tensors, read_header

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.zeros(0, 5)}


def raw(head: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), at: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at, **more}


def put(folder: Path, content: bytes, name: str = "x.safetensors") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def refused(path: Path, *words: str) -> None:
    for door in (read_header, load_tensors):
        with pytest.raises(FileError) as caught:
            door(path)
        for word in (str(path), *words):
            assert word in str(caught.value), str(caught.value)
        assert len(str(caught.value)) < 700 + len(str(path))


def poor(path: Path, word: str) -> None:
    with pytest.raises(FileError, match=word) as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)
    assert "safetensors" in str(caught.value)
