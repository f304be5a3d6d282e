"""Headers, kinds of files and what is written: each violation is a `FileError` that says what is wrong where."""

from __future__ import annotations

import collections
import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from lycoris import FileError
from lycoris.files import TensorInfo, header, load_tensors, save_tensors
from lycoris.files.headers import DTYPES

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
    for door in (header, load_tensors):
        with pytest.raises(FileError) as caught:
            door(path)
        for word in (str(path), *words):
            assert word in str(caught.value), str(caught.value)
        assert len(str(caught.value)) < 700 + len(str(path))


# -- headers ---------------------------------------------------------------------------------------------------------


def test_a_header_tells_what_is_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"note": "ünï 𝄞"})
    head = header(path)
    assert head.metadata == {"note": "ünï 𝄞"}
    assert head.size == path.stat().st_size
    assert head.tensors == {key: TensorInfo(t.dtype, tuple(t.shape), t.nbytes) for key, t in TENSORS.items()}
    with pytest.raises(TypeError):
        head.tensors["d"] = head.tensors["a"]  # type: ignore[index]
    tensors, metadata = load_tensors(path)
    assert metadata == head.metadata
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], each) for key, each in TENSORS.items())


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    path = put(tmp_path, raw({"a": entry(name, [2, 1], [0, 2 * dtype.itemsize])}, bytes(2 * dtype.itemsize)))
    assert header(path).tensors["a"] == TensorInfo(dtype, (2, 1), 2 * dtype.itemsize)
    tensors, _ = load_tensors(path)
    assert tensors["a"].dtype == dtype
    save_tensors(tensors, path, {})
    assert header(path).tensors["a"].dtype == dtype


def test_strange_headers_that_are_fine(tmp_path: Path) -> None:
    spaced = b'{ "b" :\t{"shape":[1],\n"data_offsets":[4, 8], "dtype":"F32"}, "a\\"}{": {"dtype":"F32","shape":[],'
    path = put(tmp_path, raw(spaced + b'"data_offsets":[0,4]}, "__metadata__": {"x": "}\\"{", "": ""} } \n', bytes(8)))
    assert list(header(path).tensors) == ["b", 'a"}{']
    assert header(path).metadata == {"x": '}"{', "": ""}
    assert load_tensors(path)[0].keys() == {"b", 'a"}{'}
    assert header(put(tmp_path, raw({}))).tensors == {}
    assert load_tensors(put(tmp_path, raw({"__metadata__": {}}))) == ({}, {})


def test_only_a_header_is_read(tmp_path: Path) -> None:
    """A sparse file with a terabyte of zeros."""
    count = 10**12
    path = put(tmp_path, raw({"a": entry("F32", [count // 4], [0, count])}))
    try:
        os.truncate(path, path.stat().st_size + count)
    except OSError:
        pytest.skip("this file system has no files of that size")
    assert header(path).tensors["a"].bytes == count


HEADERS: dict[str, tuple[Any, str]] = {
    "list": (b"[]      ", "begins with b'[' where { is expected"),
    "space before": (b" {}     ", "begins with b' '"),
    "number": (b"{5: 6}", "a string is expected"),
    "open": (b'{"a": ', "'a' is '' in its header"),
    "open string": (b'{"aaaa', "broken string"),
    "no colon": (b'{"a" {}}', ": is expected"),
    "no comma": (b'{"__metadata__":{} "a":1}', ", is expected"),
    "trailing comma": (b'{"__metadata__":{},}', "a string is expected"),
    "more behind": (b"{} {}", "goes on behind its end"),
    "not UTF-8": (b'{"a\xff": 1}', "not UTF-8 at byte 11"),
    "control character": (b'{"a\n": 1}', "broken string"),
    "half a character": (b'{"a\\ud800": 1}', "half a character"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        "'a' twice",
    ),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "'__metadata__' twice"),
    "metadata key twice": (b'{"__metadata__":{"k":"1","k":"2"}}', "'k' of __metadata__ twice"),
    "metadata number": ({"__metadata__": {"k": 1}}, "a string is expected"),
    "metadata null": ({"__metadata__": None}, "of __metadata__ is no JSON object"),
    "metadata list": ({"__metadata__": ["k"]}, "of __metadata__ is no JSON object"),
    "entry number": ({"a": 1}, "'a' is"),
    "entry list": ({"a": ["F32", [2], [0, 8]]}, "'a' is"),
    "entry nested": ({"a": entry(shape={})}, "'a' is"),
    "entry long": ({"a": entry("F" * 5000)}, "'a' is '{"),
    "entry deep": (b'{"a": {"shape": ' + b"[" * 3000 + b"]" * 900 + b"}}", "'a' is no JSON"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, "'a' has 'dtype, shape' in its header"),
    "field more": ({"a": entry(kind=1)}, "'dtype, shape, data_offsets, kind'"),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "each once"),
    "no fields": ({"a": {}}, "no fields"),
    "dtype unknown": ({"a": entry("F31")}, "'a' is of dtype 'F31'; known are BOOL, U8"),
    "dtype lower": ({"a": entry("f32")}, "'f32'"),
    "dtype number": ({"a": entry(32)}, "dtype 32"),
    "dtype list": ({"a": entry(["F32"])}, "dtype ['F32']"),
    "shape number": ({"a": entry(shape=2)}, "'a' has shape 2"),
    "shape negative": ({"a": entry(shape=[-2])}, "shape [-2]"),
    "shape negative twice": ({"a": entry(shape=[-2, -1])}, "shape [-2, -1]"),
    "shape float": ({"a": entry(shape=[2.0])}, "shape [2.0]"),
    "shape NaN": ({"a": entry(shape=[float("nan")])}, "shape ['NaN']"),
    "shape infinite": ({"a": entry(shape=[float("inf")])}, "shape ['Infinity']"),
    "shape boolean": ({"a": entry(shape=[True, 2])}, "shape [True, 2]"),
    "shape string": ({"a": entry(shape="2")}, "shape '2'"),
    "shape null": ({"a": entry(shape=[None])}, "shape [None]"),
    "shape long": ({"a": entry(shape=[1] * 65 + [2])}, "at most 64"),
    "shape too large": ({"a": entry(shape=[2**62, 2])}, "more than can be counted"),
    "shape wraps round": ({"a": entry(shape=[2**32, 2**32, 2])}, "more than can be counted"),
    "shape beyond": ({"a": entry(shape=[10**30])}, "whole numbers"),
    "shape of a hundred digits": ({"a": entry(shape=[10**100])}, "whole numbers"),
    "shape empty but huge": ({"a": entry(shape=[2**40, 0, 2**40], at=[0, 0])}, "more than can be counted"),
    "shape and bytes": (
        {"a": entry(shape=[3])},
        "'a' has 8 bytes, data_offsets [0, 8], and its shape [3] in F32 needs",
    ),
    "dtype and bytes": ({"a": entry("F16")}, "in F16 needs 4"),
    "offsets one": ({"a": entry(at=[8])}, "[begin, end] is expected"),
    "offsets three": ({"a": entry(at=[0, 8, 8])}, "[begin, end] is expected"),
    "offsets swapped": ({"a": entry(at=[8, 0])}, "data_offsets [8, 0] where [begin, end]"),
    "offsets negative": ({"a": entry(at=[-8, 0])}, "data_offsets [-8, 0]"),
    "offsets float": ({"a": entry(at=[0, 8.0])}, "data_offsets [0, 8.0]"),
    "offsets beyond": ({"a": entry(at=[10**19, 10**19 + 8])}, "[begin, end] is expected"),
    "hole at the start": ({"a": entry(at=[4, 12])}, "bytes 0 to 4 of its data, before 'a', are no tensor's"),
    "hole between": ({"a": entry(shape=[1], at=[0, 4]), "b": entry(shape=[0], at=[8, 8])}, "bytes 4 to 8"),
    "overlap": ({"a": entry(), "b": entry(at=[4, 12])}, "'a' ends at byte 8 of its data and 'b' begins at 4"),
    "same place": ({"a": entry(), "b": entry()}, "'a' ends at byte 8"),
    "too little": ({"a": entry(shape=[4], at=[0, 16])}, "cut short; fetch it again"),
    "too much": ({"a": entry(shape=[1], at=[0, 4])}, "the rest is no tensor's"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_each_violation_of_the_header(case: str, tmp_path: Path) -> None:
    head, word = HEADERS[case]
    refused(put(tmp_path, raw(head, bytes(8))), "cannot be read as safetensors", word)


def test_cut_short_says_how_much_there_is_and_should_be(tmp_path: Path) -> None:
    whole = save(TENSORS)
    refused(
        put(tmp_path, whole[:-3]), f"has {len(whole) - 3} bytes, its header speaks of {len(whole)}", "fetch it again"
    )
    head = 8 + int.from_bytes(whole[:8], "little")
    refused(put(tmp_path, whole[:30]), "has 30 bytes", f"its header alone {head}", "cut short")
    refused(put(tmp_path, whole[:5]), "has 5 bytes", "cut short")


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1])
def test_lengths_of_headers_that_cannot_be(length: int, tmp_path: Path) -> None:
    refused(put(tmp_path, raw({"a": entry()}, bytes(8), length)), f"header of {length} bytes")


BOMBS = {
    "nesting": b'{"a":' + b'{"a":' * 400_000,
    "lists": b'{"a":{"shape":[' + b"[]," * 600_000 + b"0]}}",
    "objects": b'{"a":[' + b"{}," * 600_000,
    "numbers": b'{"a":{"shape":[' + b"999," * 500_000 + b"0]}}",
    "digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 2_000_000 + b'],"data_offsets":[0,0]}}',
    "metadata": b'{"__metadata__":{' + b",".join(b'"%d":"%d"' % (n, n) for n in range(15_000)) + b"}",
    "one string": '{"__metadata__":{"k":"𝄞'.encode() + b"x" * 2_000_000 + b'"}',
    "key": b'{"' + b"x" * 2_000_000 + b'":{}}',
    "entries": b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(8_000)),
    "spaces": b"{" + b" " * 2_000_000,
}
SHORT = ("metadata", "entries")
"""Of many short strings, each of which is an object."""


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_header_takes_no_more_than_a_good_one(bomb: str, tmp_path: Path) -> None:
    path = put(tmp_path, raw(BOMBS[bomb]))
    tracemalloc.start()
    try:
        refused(path, "cannot be read as safetensors")
        assert tracemalloc.get_traced_memory()[1] < (20 if bomb in SHORT else 12) * len(BOMBS[bomb])
    finally:
        tracemalloc.stop()


def test_more_keys_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lycoris.files.headers.MEMBERS", 3)
    metadata = {str(n): "" for n in range(4)}
    assert len(header(put(tmp_path, raw({"__metadata__": dict(list(metadata.items())[:3])}))).metadata) == 3
    refused(put(tmp_path, raw({"__metadata__": metadata})), "of __metadata__ has more than 3 keys")


# -- tensors ---------------------------------------------------------------------------------------------------------


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


# -- other files -----------------------------------------------------------------------------------------------------


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
    assert header(tmp_path / "a.PT").tensors.keys() == TENSORS.keys()


# -- pickles ---------------------------------------------------------------------------------------------------------


def poor(path: Path, word: str) -> None:
    with pytest.raises(FileError, match=word) as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)
    assert "safetensors" in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"

    def put_down(what: Any) -> None:
        torch.save(what, path, _use_new_zipfile_serialization=zipped)

    tied = {"x": TENSORS["a"], "y": TENSORS["a"].T, "z": torch.nn.Parameter(TENSORS["a"])}
    for what in (TENSORS, {"state_dict": TENSORS, "epoch": 3}, tied, collections.OrderedDict(TENSORS)):
        put_down(what)
        found, metadata = load_tensors(path)
        wanted = what.get("state_dict", what)  # type: ignore[attr-defined]
        assert metadata == {}
        assert all(torch.equal(found[key], tensor) and not found[key].requires_grad for key, tensor in wanted.items())
        assert found.keys() == wanted.keys()
    for what in (
        [torch.ones(1)],
        {"a": 1},
        {1: torch.ones(1)},
        {"a": {"b": torch.ones(1)}},
        {"state_dict": {"a": torch.ones(1), "b": 2}},
        {"state_dict": {}, "a": 1}.popitem(),
        torch.ones(1),
        None,
    ):
        put_down(what)
        poor(path, "something other than tensors by name")
    for what, word in (
        (torch.eye(3).to_sparse(), "no plain tensor"),
        (torch.ones(3, device="meta"), "no plain tensor|cannot be read safely"),
        (torch.ones(1).expand(10**12), "needs 4000000000000 bytes and has 4"),
        (os.getcwd, "cannot be read safely: it asks for .*getcwd"),
    ):
        put_down({"a": what})
        poor(path, word)


def test_archives_that_torch_would_not_write(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    poor(tmp_path / "small.pt", "compressed archive")
    whole = bytearray((tmp_path / "good.pt").read_bytes())
    at = whole.rindex(b"PK\1\2", 0, whole.rindex(b"data/0"))
    whole[at + 20 : at + 28] = (2**30).to_bytes(4, "little") * 2
    poor(put(tmp_path, bytes(whole), "large.pt"), "its parts 10")


class Grown:
    """A tensor of eight bytes that says it has eight hundred million."""

    def __reduce__(self) -> Any:
        storage = torch.zeros(2).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, 0, (2 * 10**8,), (1,), False, collections.OrderedDict())


def test_a_pickle_cannot_ask_for_memory_that_the_file_does_not_have(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"a": Grown()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        poor(tmp_path / "a.pt", "cannot be read safely|speaks of")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(TENSORS))
    poor(tmp_path / "b.pt", "cannot be read safely")


# -- writing ---------------------------------------------------------------------------------------------------------


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
    assert header(path).metadata == {"format": "pt", "k": "v"}


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
