"""The header of a safetensors file: each violation is a `FileError` that says what is wrong where."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from storing import TENSORS, entry, put, raw, refused

from lycoris.files import TensorInfo, load_tensors, read_header, save_tensors
from lycoris.files.container.headers import DTYPES


def test_a_header_tells_what_is_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"note": "ünï 𝄞"})
    head = read_header(path)
    assert head.metadata == {"note": "ünï 𝄞"}
    assert head.size == path.stat().st_size
    assert head.tensors == {key: TensorInfo(t.dtype, tuple(t.shape), t.nbytes) for key, t in TENSORS.items()}
    with pytest.raises(TypeError):
        head.tensors["d"] = head.tensors["a"]  # type: ignore[index]  # wrong on purpose
    tensors, metadata = load_tensors(path)
    assert metadata == head.metadata
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], each) for key, each in TENSORS.items())


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    path = put(tmp_path, raw({"a": entry(name, [2, 1], [0, 2 * dtype.itemsize])}, bytes(2 * dtype.itemsize)))
    assert read_header(path).tensors["a"] == TensorInfo(dtype, (2, 1), 2 * dtype.itemsize)
    tensors, _ = load_tensors(path)
    assert tensors["a"].dtype == dtype
    save_tensors(tensors, path, {})
    assert read_header(path).tensors["a"].dtype == dtype


def test_strange_headers_that_are_fine(tmp_path: Path) -> None:
    spaced = b'{ "b" :\t{"shape":[1],\n"data_offsets":[4, 8], "dtype":"F32"}, "a\\"}{": {"dtype":"F32","shape":[],'
    path = put(tmp_path, raw(spaced + b'"data_offsets":[0,4]}, "__metadata__": {"x": "}\\"{", "": ""} } \n', bytes(8)))
    assert list(read_header(path).tensors) == ["b", 'a"}{']
    assert read_header(path).metadata == {"x": '}"{', "": ""}
    assert load_tensors(path)[0].keys() == {"b", 'a"}{'}
    assert read_header(put(tmp_path, raw({}))).tensors == {}
    assert load_tensors(put(tmp_path, raw({"__metadata__": {}}))) == ({}, {})


def test_only_a_header_is_read(tmp_path: Path) -> None:
    """A sparse file with a terabyte of zeros."""
    count = 10**12
    path = put(tmp_path, raw({"a": entry("F32", [count // 4], [0, count])}))
    try:
        os.truncate(path, path.stat().st_size + count)
    except OSError:
        pytest.skip("this file system has no files of that size")
    assert read_header(path).tensors["a"].bytes == count


HEADERS: dict[str, tuple[Any, str]] = {
    "list": (b"[]      ", "begins with b'[' where { is expected"),
    "space before": (b" {}     ", "begins with b' '"),
    "number": (b"{5: 6}", "a string is expected"),
    "open": (b'{"a": ', "'a' is '' in its header"),
    "open string": (b'{"aaaa', "broken string"),
    "no colon": (b'{"a" {}}', ": is expected"),
    "no comma": (b'{"__metadata__":{} "a":1}', ", is expected"),
    "trailing comma": (b'{"__metadata__":{},}', "a string is expected"),
    "more behind": (b"{} {}", "has data after its end"),
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
    "shape beyond": ({"a": entry(shape=[10**30])}, "non-negative integers"),
    "shape of a hundred digits": ({"a": entry(shape=[10**100])}, "non-negative integers"),
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
    "too little": ({"a": entry(shape=[4], at=[0, 16])}, "truncated; download it again"),
    "too much": ({"a": entry(shape=[1], at=[0, 4])}, "the rest is no tensor's"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_each_violation_of_the_header(case: str, tmp_path: Path) -> None:
    head, word = HEADERS[case]
    refused(put(tmp_path, raw(head, bytes(8))), "cannot be read as safetensors", word)


def test_cut_short_says_how_much_there_is_and_should_be(tmp_path: Path) -> None:
    whole = save(TENSORS)
    refused(
        put(tmp_path, whole[:-3]), f"has {len(whole) - 3} bytes, its header describes {len(whole)}", "download it again"
    )
    head = 8 + int.from_bytes(whole[:8], "little")
    refused(put(tmp_path, whole[:30]), "has 30 bytes", f"its header alone {head}", "truncated")
    refused(put(tmp_path, whole[:5]), "has 5 bytes", "truncated")


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


@pytest.mark.sample(5)
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
    monkeypatch.setattr("lycoris.files.container.headers.MAX_KEYS", 3)
    metadata = {str(n): "" for n in range(4)}
    assert len(read_header(put(tmp_path, raw({"__metadata__": dict(list(metadata.items())[:3])}))).metadata) == 3
    refused(put(tmp_path, raw({"__metadata__": metadata})), "of __metadata__ has more than 3 keys")
