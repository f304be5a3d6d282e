"""Read a safetensors header, checking it in full before anything in it is used.

The format: eight bytes, the length of the header; the header, a JSON object; the tensors' bytes, without gaps.

A JSON value can take many times its text in memory, so only flat and short ones are handed to the parser, and at most
`MAX_KEYS` of them: a hostile header costs no more than a good one of its size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch

from lycoris.errors import FileError
from lycoris.files.container.kinds import HEADER_LIMIT, examine

MemberValue = TypeVar("MemberValue")

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        name: getattr(torch, own)
        for name, own in {
            "BOOL": "bool",
            "U8": "uint8",
            "I8": "int8",
            "U16": "uint16",
            "I16": "int16",
            "U32": "uint32",
            "I32": "int32",
            "U64": "uint64",
            "I64": "int64",
            "F16": "float16",
            "BF16": "bfloat16",
            "F32": "float32",
            "F64": "float64",
            "F8_E4M3": "float8_e4m3fn",
            "F8_E5M2": "float8_e5m2",
            "F8_E4M3FNUZ": "float8_e4m3fnuz",
            "F8_E5M2FNUZ": "float8_e5m2fnuz",
            "F8_E8M0": "float8_e8m0fnu",
            "C64": "complex64",
        }.items()
        if hasattr(torch, own)
    }
)
"""Those of whole bytes, by safetensors' names."""

MAX_DIMENSIONS = 64
"""More than that many of torch's operations refuse."""
LARGEST_SIZE = 2**63 - 1
MAX_KEYS = 500_000
"""More keys than any model has tensors; without a limit a header of the largest size would take half a minute."""
ENTRY_FIELDS = ("dtype", "shape", "data_offsets")
ENTRY = re.compile(r"\{[^{}]{0,4000}\}")
STRINGS = json.JSONDecoder()
OBJECTS = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=str)
SPACE = re.compile(r"[ \t\n\r]*")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SHOWN_CHARS = 60


class TensorInfo(NamedTuple):
    """Type, shape and size of a tensor that has not been read.

    `bytes` is the size of its data in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Header:
    """The content of a safetensors header.

    Made by `read_header`, which checks all of it first.
    """

    tensors: Mapping[str, TensorInfo]
    """In the order of the header."""
    metadata: Mapping[str, str]
    size: int
    """Bytes of the whole file."""


class _Placed(NamedTuple):
    info: TensorInfo
    begin: int
    end: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Returns:
        Tensors and metadata in the order of the file, and its size.

    Raises:
        FileError: The file cannot be read, or its header is invalid: a tensor's type, shape and offsets do not agree,
            offsets leave gaps or overlap, or metadata are not strings. The message names the file and the entry.
    """
    path = Path(path)
    kind, size, _ = examine(path)
    if kind in ("zip", "pickle"):
        raise FileError(f"{path} is a pickle, not safetensors: it has no header; save it as safetensors")
    try:
        text, start = _read_header_text(path, size)
        tensors, metadata, data = _parse_header(text)
        _check_size(size, start + data)
    except FileError as error:
        raise FileError(f"{path} cannot be read as safetensors: {error}") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    return Header(MappingProxyType(tensors), MappingProxyType(metadata), size)


def _read_header_text(path: Path, size: int) -> tuple[str, int]:
    """The header, read once its length is known to be possible, and where the data begin."""
    with path.open("rb") as file:
        start = file.read(9)
        if len(start) < 8:
            raise FileError(f"it has {size} bytes, fewer than the 8 that every file begins with: it is truncated")
        length = int.from_bytes(start[:8], "little")
        if length > HEADER_LIMIT:
            raise FileError(
                f"its first 8 bytes would mean a header of {length} bytes, and {HEADER_LIMIT} is the most: "
                "it is damaged or no such file"
            )
        if length < 2:
            raise FileError(f"it has a header of {length} bytes, and the shortest is {{}}: it is damaged")
        if start[8:] not in (b"{", b""):
            raise FileError(f"its header begins with {start[8:]!r} where {{ is expected: it is damaged or no such file")
        if length > size - 8:
            raise FileError(
                f"it has {size} bytes, and its header alone {8 + length}: it is truncated; download it again"
            )
        file.seek(8)
        content = file.read(length)
    if len(content) < length:
        raise FileError("it was truncated while being read; download it again")
    try:
        return content.decode(), 8 + length
    except UnicodeDecodeError as error:
        raise FileError(
            f"its header is not UTF-8 at byte {8 + error.start}: it is damaged; download it again"
        ) from None


def _check_size(size: int, spoken: int) -> None:
    if size < spoken:
        raise FileError(f"it has {size} bytes, its header describes {spoken}: it is truncated; download it again")
    if size > spoken:
        raise FileError(
            f"it has {size} bytes, its header describes {spoken}: the rest is no tensor's; download it again"
        )


def _parse_header(text: str) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """Tensors, metadata, and how many bytes of data there must be."""
    metadata: dict[str, str] = {}

    def value(key: str, at: int) -> tuple[_Placed | None, int]:
        if key != "__metadata__":
            return _parse_entry(text, key, at)
        found, at = _parse_members(text, at, lambda _, start: _parse_string(text, start), " of __metadata__")
        metadata.update(found)
        return None, at

    found, at = _parse_members(text, 0, value)
    if (at := _skip_space(text, at)) != len(text):
        raise FileError(f"its header has data after its end, with {_show(text[at : at + SHOWN_CHARS])}: it is damaged")
    placed = {key: each for key, each in found.items() if each is not None}
    return {key: each.info for key, each in placed.items()}, metadata, _check_offsets(placed)


def _parse_members(
    text: str, at: int, value: Callable[[str, int], tuple[MemberValue, int]], where: str = ""
) -> tuple[dict[str, MemberValue], int]:
    """The members of the object at `at`, and where it ends; `value` reads the value of a key at a place."""
    found: dict[str, MemberValue] = {}
    at = _expect_sign(text, at, "{", where)
    if text.startswith("}", _skip_space(text, at)):
        return found, _skip_space(text, at) + 1
    while True:
        key, at = _parse_string(text, at)
        if key in found:
            raise FileError(f"its header has the key {_show(key)}{where} twice, which is ambiguous")
        if len(found) == MAX_KEYS:
            raise FileError(f"its header{where} has more than {MAX_KEYS} keys: it is no adapter's")
        found[key], at = value(key, _expect_sign(text, at, ":", where))
        at = _skip_space(text, at)
        if text.startswith("}", at):
            return found, at + 1
        at = _expect_sign(text, at, ",", where)


def _skip_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return at if found is None else found.end()


def _expect_sign(text: str, at: int, sign: str, where: str) -> int:
    at = _skip_space(text, at)
    if not text.startswith(sign, at):
        raise FileError(
            f"its header{where} is no JSON object: {sign} is expected at character {at}, "
            f"found {_show(text[at : at + SHOWN_CHARS]) if at < len(text) else 'its end'}"
        )
    return at + 1


def _parse_string(text: str, at: int) -> tuple[str, int]:
    at = _skip_space(text, at)
    if not text.startswith('"', at):
        found = _show(text[at : at + SHOWN_CHARS]) if at < len(text) else "its end"
        raise FileError(f"its header has {found} at character {at} where a string is expected")
    try:
        found, end = STRINGS.raw_decode(text, at)
    except ValueError as error:
        raise FileError(f"its header has a broken string at character {at}: {str(error)[:SHOWN_CHARS]}") from None
    if LONE_SURROGATE.search(found):
        raise FileError(f"its header has a string with half a character at character {at}: {_show(found)}")
    return found, end


def _parse_entry(text: str, key: str, at: int) -> tuple[_Placed, int]:
    """What a tensor's key stands for."""
    at = _skip_space(text, at)
    found = ENTRY.match(text, at)
    if found is None:
        raise FileError(
            f'{_show(key)} is {_show(text[at : at + SHOWN_CHARS])} in its header where {{"dtype": ..., "shape": ..., '
            '"data_offsets": ...} is expected'
        )
    try:
        entry = OBJECTS.decode(found[0])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{_show(key)} is no JSON in its header: {str(error)[:SHOWN_CHARS]}") from None
    fields = [name for name, _ in entry]
    if sorted(fields) != sorted(ENTRY_FIELDS):
        raise FileError(
            f"{_show(key)} has {_show(', '.join(fields)) if fields else 'no fields'} in its header where dtype, shape "
            "and data_offsets are expected, each once"
        )
    return _check_entry(key, **dict(entry)), found.end()


def _check_entry(key: str, dtype: Any, shape: Any, data_offsets: Any) -> _Placed:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(f"{_show(key)} is of dtype {_show(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise FileError(
            f"{_show(key)} has shape {_show(shape)} where at most {MAX_DIMENSIONS} non-negative integers are expected"
        )
    if not _are_sizes(data_offsets) or len(data_offsets) != 2 or data_offsets[0] > data_offsets[1]:
        raise FileError(f"{_show(key)} has data_offsets {_show(data_offsets)} where [begin, end] is expected")
    count = span = 1
    for size in shape:
        # Strides are products too, and those of a tensor without elements leave zeros out.
        count, span = count * size, span * max(size, 1)
        if span > LARGEST_SIZE // 8:
            raise FileError(f"{_show(key)} has shape {_show(shape)}, more than can be counted")
    begin, end = data_offsets
    needed = count * DTYPES[dtype].itemsize
    if needed != end - begin:
        raise FileError(
            f"{_show(key)} has {end - begin} bytes, data_offsets {_show(data_offsets)}, and its shape "
            f"{_show(shape)} in {dtype} needs {needed}"
        )
    return _Placed(TensorInfo(DTYPES[dtype], tuple(shape), needed), begin, end)


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(each) is int and 0 <= each <= LARGEST_SIZE for each in found)


def _check_offsets(placed: Mapping[str, _Placed]) -> int:
    """Where the last tensor ends. Raises `FileError` at a gap or an overlap."""
    reached, before = 0, ""
    for key, (_, begin, end) in sorted(placed.items(), key=lambda item: item[1][1:]):
        if begin > reached:
            raise FileError(f"bytes {reached} to {begin} of its data, before {_show(key)}, are no tensor's")
        if begin < reached:
            raise FileError(f"{_show(before)} ends at byte {reached} of its data and {_show(key)} begins at {begin}")
        reached, before = end, key
    return reached


def _show(found: Any) -> str:
    """A value as errors show it, of a length to read."""
    shown = repr(found[:SHOWN_CHARS] if isinstance(found, str) else found)
    return shown if len(shown) <= SHOWN_CHARS + 2 else shown[:SHOWN_CHARS] + "..."
