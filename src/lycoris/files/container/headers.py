"""What a safetensors file says of itself, read alone and checked in full before any of it is believed.

The format: eight bytes, the length of the header; the header, a JSON object; the tensors' bytes, without gaps.

A JSON value can take many times its text in memory, so only flat and short ones are handed to the parser, and there may
be `MEMBERS` of them: a hostile header costs no more than a good one of its size.
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

T = TypeVar("T")

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

DIMENSIONS = 64
"""More than that many of torch's operations refuse."""
LARGEST = 2**63 - 1
MEMBERS = 500_000
"""More keys than any model has tensors; without a limit a header of the largest size would take half a minute."""
FIELDS = ("dtype", "shape", "data_offsets")
ENTRY = re.compile(r"\{[^{}]{0,4000}\}")
STRINGS = json.JSONDecoder()
OBJECTS = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=str)
SPACE = re.compile(r"[ \t\n\r]*")
LONE = re.compile("[\ud800-\udfff]")
SHOWN = 60


class TensorInfo(NamedTuple):
    """A tensor that has not been read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Header:
    """What a file holds."""

    tensors: Mapping[str, TensorInfo]
    """In the order of the header."""
    metadata: Mapping[str, str]
    size: int
    """Bytes of the whole file."""


class _Placed(NamedTuple):
    info: TensorInfo
    begin: int
    end: int


def header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises `FileError`, naming the file and what is wrong in it, unless every tensor's type, shape and place agree, the
    places fill the file without gap or overlap, and the metadata are strings by string.
    """
    path = Path(path)
    kind, size, _ = examine(path)
    if kind in ("zip", "pickle"):
        raise FileError(f"{path} is a pickle, not safetensors: it has no header; save it as safetensors")
    try:
        text, start = _text(path, size)
        tensors, metadata, data = _parse_header(text)
        _same_size(size, start + data)
    except FileError as error:
        raise FileError(f"{path} cannot be read as safetensors: {error}") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    return Header(MappingProxyType(tensors), MappingProxyType(metadata), size)


def _text(path: Path, size: int) -> tuple[str, int]:
    """The header, read once its length is known to be possible, and where the data begin."""
    with path.open("rb") as file:
        start = file.read(9)
        if len(start) < 8:
            raise FileError(f"it has {size} bytes, fewer than the 8 that every file begins with: it was cut short")
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
            raise FileError(f"it has {size} bytes, and its header alone {8 + length}: it was cut short; fetch it again")
        file.seek(8)
        content = file.read(length)
    if len(content) < length:
        raise FileError("it was cut short while it was read; fetch it again")
    try:
        return content.decode(), 8 + length
    except UnicodeDecodeError as error:
        raise FileError(f"its header is not UTF-8 at byte {8 + error.start}: it is damaged; fetch it again") from None


def _same_size(size: int, spoken: int) -> None:
    if size < spoken:
        raise FileError(f"it has {size} bytes, its header speaks of {spoken}: it was cut short; fetch it again")
    if size > spoken:
        raise FileError(f"it has {size} bytes, its header speaks of {spoken}: the rest is no tensor's; fetch it again")


def _parse_header(text: str) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """Tensors, metadata, and how many bytes of data there must be."""
    metadata: dict[str, str] = {}

    def value(key: str, at: int) -> tuple[_Placed | None, int]:
        if key != "__metadata__":
            return _entry(text, key, at)
        found, at = _members(text, at, lambda _, start: _string(text, start), " of __metadata__")
        metadata.update(found)
        return None, at

    found, at = _members(text, 0, value)
    if (at := _skip(text, at)) != len(text):
        raise FileError(f"its header goes on behind its end, with {_show(text[at : at + SHOWN])}: it is damaged")
    placed = {key: each for key, each in found.items() if each is not None}
    return {key: each.info for key, each in placed.items()}, metadata, _fill(placed)


def _members(
    text: str, at: int, value: Callable[[str, int], tuple[T, int]], where: str = ""
) -> tuple[dict[str, T], int]:
    """The members of the object at `at`, and where it ends; `value` reads the value of a key at a place."""
    found: dict[str, T] = {}
    at = _expect(text, at, "{", where)
    if text.startswith("}", _skip(text, at)):
        return found, _skip(text, at) + 1
    while True:
        key, at = _string(text, at)
        if key in found:
            raise FileError(f"its header has the key {_show(key)}{where} twice: which is meant cannot be told")
        if len(found) == MEMBERS:
            raise FileError(f"its header{where} has more than {MEMBERS} keys: it is no adapter's")
        found[key], at = value(key, _expect(text, at, ":", where))
        at = _skip(text, at)
        if text.startswith("}", at):
            return found, at + 1
        at = _expect(text, at, ",", where)


def _skip(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return at if found is None else found.end()


def _expect(text: str, at: int, sign: str, where: str) -> int:
    at = _skip(text, at)
    if not text.startswith(sign, at):
        raise FileError(
            f"its header{where} is no JSON object: {sign} is expected at character {at}, "
            f"found {_show(text[at : at + SHOWN]) if at < len(text) else 'its end'}"
        )
    return at + 1


def _string(text: str, at: int) -> tuple[str, int]:
    at = _skip(text, at)
    if not text.startswith('"', at):
        found = _show(text[at : at + SHOWN]) if at < len(text) else "its end"
        raise FileError(f"its header has {found} at character {at} where a string is expected")
    try:
        found, end = STRINGS.raw_decode(text, at)
    except ValueError as error:
        raise FileError(f"its header has a broken string at character {at}: {str(error)[:SHOWN]}") from None
    if LONE.search(found):
        raise FileError(f"its header has a string with half a character at character {at}: {_show(found)}")
    return found, end


def _entry(text: str, key: str, at: int) -> tuple[_Placed, int]:
    """What a tensor's key stands for."""
    at = _skip(text, at)
    found = ENTRY.match(text, at)
    if found is None:
        raise FileError(
            f'{_show(key)} is {_show(text[at : at + SHOWN])} in its header where {{"dtype": ..., "shape": ..., '
            '"data_offsets": ...} is expected'
        )
    try:
        entry = OBJECTS.decode(found[0])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{_show(key)} is no JSON in its header: {str(error)[:SHOWN]}") from None
    fields = [name for name, _ in entry]
    if sorted(fields) != sorted(FIELDS):
        raise FileError(
            f"{_show(key)} has {_show(', '.join(fields)) if fields else 'no fields'} in its header where dtype, shape "
            "and data_offsets are expected, each once"
        )
    return _place_tensor(key, **dict(entry)), found.end()


def _place_tensor(key: str, dtype: Any, shape: Any, data_offsets: Any) -> _Placed:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(f"{_show(key)} is of dtype {_show(dtype)}; known are {', '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > DIMENSIONS:
        raise FileError(
            f"{_show(key)} has shape {_show(shape)} where at most {DIMENSIONS} whole numbers from 0 on are expected"
        )
    if not _sizes(data_offsets) or len(data_offsets) != 2 or data_offsets[0] > data_offsets[1]:
        raise FileError(f"{_show(key)} has data_offsets {_show(data_offsets)} where [begin, end] is expected")
    count = span = 1
    for size in shape:
        # Strides are products too, and those of a tensor without elements leave zeros out.
        count, span = count * size, span * max(size, 1)
        if span > LARGEST // 8:
            raise FileError(f"{_show(key)} has shape {_show(shape)}, more than can be counted")
    begin, end = data_offsets
    needed = count * DTYPES[dtype].itemsize
    if needed != end - begin:
        raise FileError(
            f"{_show(key)} has {end - begin} bytes, data_offsets {_show(data_offsets)}, and its shape "
            f"{_show(shape)} in {dtype} needs {needed}"
        )
    return _Placed(TensorInfo(DTYPES[dtype], tuple(shape), needed), begin, end)


def _sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(each) is int and 0 <= each <= LARGEST for each in found)


def _fill(placed: Mapping[str, _Placed]) -> int:
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
    shown = repr(found[:SHOWN] if isinstance(found, str) else found)
    return shown if len(shown) <= SHOWN + 2 else shown[:SHOWN] + "..."
