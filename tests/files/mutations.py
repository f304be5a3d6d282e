"""Good adapter files made bad, each case from its own seed."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lycoris.files.container.headers import DTYPES

Mutation = Callable[[random.Random, bytes], bytes]

NUMBERS = (0, 1, 2, -1, -8, 3.5, 1e400, float("nan"), 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**40)
ODD = (None, True, False, "", "x", "3", "F32", [], {}, [[]], [1], {"a": 1}, "\ud800", "\0", "ünï", "x" * 5000)
NAMES = ("__metadata__", "", ".", "a\ud800", "a\0b", "\n", "ключ", "../x", "x" * 3000, "lycoris_", "lora_unet_a.alpha")
TYPES = (*DTYPES, "F4", "F6_E2M3", "f32", "float32", "F128", "I4", "Q8_0", "", "BF16 ", "F32\0")
SUFFIXES = (
    *("alpha", "lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "dora_scale"),
    *("lokr_w1", "lokr_w2_b", "lokr_t2", "hada_w1_a", "hada_w2_b", "hada_t1", "a1.weight", "b2.weight", "scalar"),
    *(
        "oft_blocks",
        "oft_diag",
        "rescale",
        "diff",
        "diff_b",
        "w_norm",
        "b_norm",
        "on_input",
        "weight",
        "reshape_weight",
    ),
)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(head: Any, data: bytes) -> bytes:
    try:
        text = head if isinstance(head, bytes) else json.dumps(head).encode()
    except ValueError:
        text = repr(head).encode()  # an object that was put into itself
    return len(text).to_bytes(8, "little") + text + data


def number(r: random.Random) -> Any:
    return r.choice([r.choice(NUMBERS), r.choice(NUMBERS), r.randrange(200), r.choice(ODD)])


# -- structure of a header -------------------------------------------------------------------------------------------


def entries(r: random.Random, content: bytes) -> bytes:
    """Values of some entries replaced; what they belong to stays."""
    head, data = split(content)
    for _ in range(r.choice([1, 1, 1, 2, 4])):
        key = r.choice([key for key in head if key != "__metadata__"])
        entry = head[key]
        if not isinstance(entry, dict):
            continue
        field = r.choice(["dtype", "shape", "shape", "data_offsets", "data_offsets", "whole", "drop", "more"])
        if field == "dtype":
            entry["dtype"] = r.choice([r.choice(TYPES), number(r)])
        elif field in ("shape", "data_offsets"):
            entry[field] = numbers(r, entry.get(field))
        elif field == "whole":
            head[key] = r.choice(ODD)
        elif field == "drop":
            entry.pop(r.choice(["dtype", "shape", "data_offsets"]), None)
        else:
            entry[r.choice(NAMES)] = number(r)
    return join(head, data)


def numbers(r: random.Random, found: Any) -> Any:
    """A list of numbers, changed in one way."""
    values = list(found) if isinstance(found, list) else []
    way = r.randrange(8)
    if way == 0:
        return r.choice(ODD)
    if way == 1:
        return values[::-1]
    if way == 2:
        return [*values, number(r)]
    if way == 3:
        return [1] * r.choice([63, 64, 65, 1000])
    if way == 4:
        return [r.choice([2**16, 2**31, 2**32, 2**62, 0]) for _ in range(r.randrange(6))]
    if way == 5 and values:
        return [value + r.choice([-8, -4, -1, 1, 4, 8]) if isinstance(value, int) else value for value in values]
    if values:
        values[r.randrange(len(values))] = number(r)
    return values


def layout(r: random.Random, content: bytes) -> bytes:
    """Offsets exchanged, moved together, made to overlap or to leave holes."""
    head, data = split(content)
    keys = [key for key in head if key != "__metadata__"]
    one, other = (head[r.choice(keys)] for _ in range(2))
    way = r.randrange(5)
    if way == 0:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif way == 1:
        one["data_offsets"] = other["data_offsets"]
    elif way == 2:
        move = r.choice([-8, -1, 1, 8, 2**40, 2**63])
        one["data_offsets"] = [at + move for at in one["data_offsets"]]
    elif way == 3:
        del head[r.choice(keys)]
    else:
        head = dict(r.sample(list(head.items()), len(head)))
    return join(head, data)


def metadata(r: random.Random, content: bytes) -> bytes:
    head, data = split(content)
    value = r.choice([number(r), {"k": number(r)}, {r.choice(NAMES): "v"}, {"k": {"k": "v"}}, ["k", "v"]])
    head["__metadata__"] = value
    return join(head, data)


def names(r: random.Random, content: bytes) -> bytes:
    head, data = split(content)
    old, new = r.choice(list(head)), r.choice(NAMES)
    return join({new if key == old else key: value for key, value in head.items()}, data)


def text(r: random.Random, content: bytes) -> bytes:
    """What JSON itself can have wrong: duplicates, depth, signs missing or too many, other encodings."""
    head, data = split(content)
    whole = json.dumps(head)
    at = r.randrange(len(whole))
    sign = r.choice([*'{}[]",:0-.eE\\ \n\0', "null", "NaN", "-Infinity", "\\u0000", "\\ud800", "1e999", "9" * 5000])
    way = r.randrange(9)
    if way == 0:
        whole = whole[:at] + sign + whole[at:]
    elif way == 1:
        whole = whole[:at] + whole[at + r.choice([1, 1, 2, 10]) :]
    elif way == 2:
        whole = whole[:at] + sign + whole[at + 1 :]
    elif way == 3:
        whole = whole[:-1] + "," + whole[1:]
    elif way == 4:
        whole = whole.replace('"shape"', r.choice(['"dtype"', '"data_offsets"', '"sh\\u0061pe"']), r.choice([1, -1]))
    elif way == 5:
        deep = r.choice(["[", '{"a":', '[{"a":'])
        whole = whole[:at] + deep * r.choice([2, 100, 1000, 20000]) + whole[at:]
    elif way == 6:
        forms = ["[X]", '"X"', " X", "\ufeffX", "X\0", "X,", "XX", "", "{}", "X{}", "{"]
        whole = r.choice(forms).replace("X", whole)
    elif way == 7:
        return join(whole.encode(r.choice(["utf-16", "utf-32", "utf-16-le"])), data)
    else:
        whole = whole.replace('":', r.choice(['" :\t', '"::', '"=', '"']), r.choice([1, -1]))
    return join(whole.encode("utf-8", "replace"), data)


# -- bytes -----------------------------------------------------------------------------------------------------------


def length(r: random.Random, content: bytes) -> bytes:
    true = int.from_bytes(content[:8], "little")
    wrong = r.choice(
        [0, 1, 2, true - 1, true + 1, true // 2, true + 8, len(content), len(content) - 8, 10**8, 10**8 + 1]
    )
    wrong = r.choice([wrong, r.randrange(2**64), 2 ** r.randrange(64), r.randrange(len(content))])
    return wrong.to_bytes(8, "little") + content[8:]


def cut(r: random.Random, content: bytes) -> bytes:
    header = 8 + int.from_bytes(content[:8], "little")
    return content[
        : r.choice([r.randrange(10), r.randrange(header), header, r.randrange(len(content)), len(content) - 1])
    ]


def flips(r: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    end = min(len(changed), r.choice([len(changed), len(changed), 600, 8]))
    for _ in range(r.choice([1, 1, 2, 8, 64])):
        at = r.randrange(end)
        changed[at] = r.choice([changed[at] ^ (1 << r.randrange(8)), r.randrange(256)])
    return bytes(changed)


def pieces(r: random.Random, content: bytes) -> bytes:
    """Something taken out, put in twice, or put in from elsewhere."""
    a, b = sorted(r.randrange(len(content)) for _ in range(2))
    way = r.randrange(4)
    if way == 0:
        return content[:a] + content[b:]
    if way == 1:
        return content[:b] + content[a:]
    if way == 2:
        return content[:a] + r.randbytes(r.choice([1, 8, 64])) + content[a:]
    return content + content[a:b]


# -- pickles ---------------------------------------------------------------------------------------------------------


def zipped(r: random.Random, content: bytes) -> bytes:
    """The parts of a zip archive changed, in an archive whose checksums are right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    target = r.choice([name for name in parts if name.endswith(("data.pkl", "version", "/0"))])
    way = r.randrange(5)
    if way == 0:
        del parts[target]
    elif way == 1:
        parts[target + "x"] = parts.pop(target)
    else:
        parts[target] = r.choice([flips, pieces, cut_anywhere, opcodes])(r, parts[target] or b"\0")
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", r.choice([zipfile.ZIP_STORED] * 5 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return made.getvalue()


def cut_anywhere(r: random.Random, content: bytes) -> bytes:
    return content[: r.randrange(len(content))]


def opcodes(r: random.Random, content: bytes) -> bytes:
    """Numbers of a pickle made large, or opcodes put in."""
    changed, at = bytearray(content), r.randrange(len(content))
    spots = [n for n, byte in enumerate(changed) if byte in b"KMJ"]
    if spots and r.random() < 0.7:
        spot = r.choice(spots)
        changed[spot : spot + 2] = r.choice([b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"J\0\0\0\x80"])
    else:
        changed[at:at] = r.choice(
            [b"2", b"0", b"(", b"t", b"R", b"b", b"h\0", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff"]
        )
    return bytes(changed)


# -- adapters: good files that say something else --------------------------------------------------------------------


def tensors(r: random.Random, content: bytes) -> bytes:
    """Names, shapes, types and values of some tensors changed."""
    found = load(content)
    for _ in range(r.choice([1, 1, 1, 3, 10])):
        key = r.choice(list(found))
        way = r.randrange(6)
        if way == 0:
            del found[key]
        elif way == 1:
            found[renamed(r, key, found)] = found[key].clone()
        elif way == 2:
            found[renamed(r, key, found)] = found.pop(key)
        elif way == 3:
            found[key] = reshaped(r, found[key])
        elif way == 4:
            found[key] = found[key].to(DTYPES[r.choice(list(DTYPES))])
        else:
            found[key] = fill_tensor(r, found[key])
        if not found:
            break
    return save({key: tensor.contiguous() for key, tensor in found.items()}, metadata={"format": "pt"})


def renamed(r: random.Random, key: str, found: Mapping[str, Tensor]) -> str:
    layer, _, suffix = key.partition(".")
    other, _, spelling = r.choice(list(found)).partition(".")
    strange = r.choice([r.choice(SUFFIXES), r.choice(["", ".", "x", "ünï", "a.b.c"])])
    return r.choice([f"{other}.{suffix}", f"{layer}.{spelling}", f"{layer}.{strange}", f"{layer}_{suffix}", strange])


def reshaped(r: random.Random, tensor: Tensor) -> Tensor:
    ways: list[Callable[[], Tensor]] = [
        lambda: tensor.reshape(-1),
        lambda: tensor[None],
        lambda: tensor[..., None, None],
        lambda: tensor.T if tensor.ndim == 2 else tensor[..., None],
        lambda: tensor.reshape(-1)[:0],
        lambda: torch.zeros(()),
        lambda: tensor[:0] if tensor.ndim else tensor,
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(3),
        lambda: torch.zeros([r.choice([0, 1, 2, 3, 7]) for _ in range(r.randrange(7))]),
        lambda: torch.zeros([1] * 64),
    ]
    return r.choice(ways)()


def fill_tensor(r: random.Random, tensor: Tensor) -> Tensor:
    value = r.choice([float("nan"), float("inf"), -float("inf"), 1e38, -1.0, 0.0, 1e-45, 2.0**63])
    changed = tensor.clone().reshape(-1)
    if not changed.is_floating_point():
        return torch.full(tensor.shape, value)
    changed[r.randrange(max(1, len(changed))) :] = value
    return changed.reshape(tensor.shape)


STRUCTURE: tuple[Mutation, ...] = (entries, entries, layout, metadata, names, text, text)
BYTES: tuple[Mutation, ...] = (length, cut, flips, flips, pieces)
ZIPS: tuple[Mutation, ...] = (zipped, zipped, flips, cut_anywhere, pieces)
LEGACY: tuple[Mutation, ...] = (opcodes, opcodes, flips, cut_anywhere, pieces)
ADAPTERS: tuple[Mutation, ...] = (tensors, tensors, tensors, entries, names, flips)
